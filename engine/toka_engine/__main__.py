"""`python -m toka_engine`: the same as the command `toka`."""

from toka_engine.entry import main

main()

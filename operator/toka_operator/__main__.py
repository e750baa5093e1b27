"""`python -m toka_operator`."""

from __future__ import annotations

import sys

from toka_operator.main import main

if __name__ == "__main__":
    sys.exit(main())

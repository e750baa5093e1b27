"""python -m toka_engine.server CONTROL_FD MANAGER_FD [LISTEN_FD]"""

from toka_engine.child import run_child
from toka_engine.server.process import main

run_child("server", main)

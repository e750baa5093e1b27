"""python -m toka_engine.manager CONTROL_FD SERVER_FD WORKER_FD..."""

from toka_engine.child import run_child
from toka_engine.manager.loop import main

if __name__ == "__main__":
    run_child("manager", main)

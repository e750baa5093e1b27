"""`python -m toka_engine.model CONTROL_FD MANAGER_FD`: the model worker, started by the supervisor."""

from toka_engine.child import run_child
from toka_engine.model.worker import run_worker

if __name__ == "__main__":
    run_child("model", run_worker)

"""`python -m toka_engine.server.preparing`: the process for large requests, started by the server."""

from toka_engine.server.preparing.tasks import run

if __name__ == "__main__":
    run()

"""`python -m toka_engine.grammar`: the grammar checker, started by the server."""

from toka_engine.grammar.checker import run

if __name__ == "__main__":
    run()

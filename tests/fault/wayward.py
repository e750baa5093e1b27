"""`toka` whose second rank goes astray: `python -m tests.fault.wayward key=value ...`, TOKA_TEST_FAULT says how."""

import sys

from toka_engine.entry import run
from toka_engine.supervisor import MODULES

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], {**MODULES, "model": "tests.fault.wayward_model"}))

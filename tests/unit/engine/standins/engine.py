"""The real `toka` with stand-in children: `python -m tests.unit.engine.standins.engine key=value ...`."""

import sys

from toka_engine.entry import run
from toka_engine.supervisor import MODULES

NAMES = {name: f"tests.unit.engine.standins.{name}" for name in ("server", "manager", "model")}

sys.exit(run(sys.argv[1:], {**MODULES, **NAMES}))

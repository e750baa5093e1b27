"""The real `toka` with stand-in children: `python -m tests.unit.engine.standins.engine key=value ...`."""

import ctypes
import os
import sys

from toka_engine import heartbeat, rank_watch, supervisor
from toka_engine.control_messages import RankInfo
from toka_engine.entry import run
from toka_engine.processes import MAX_BUSY_S
from toka_engine.supervisor import MODULES
from toka_engine.topology import make_topology

NAMES = {name: f"tests.unit.engine.standins.{name}" for name in ("server", "manager", "model")}
PR_SET_CHILD_SUBREAPER = 36

if limit := os.environ.get("TOKA_TEST_MAX_BUSY_S"):
    MAX_BUSY_S.update(dict.fromkeys(MAX_BUSY_S, float(limit)))
if beats := os.environ.get("TOKA_TEST_BEATS"):
    heartbeat.SILENT_PINGS_STARTING = rank_watch.UNEVEN_BEATS = rank_watch.ENDLESS_BEATS = int(beats)
if beats := os.environ.get("TOKA_TEST_STARVED_BEATS"):
    heartbeat.SILENT_PINGS_STARVED = int(beats)
if margin := os.environ.get("TOKA_TEST_DRAIN_MARGIN_S"):
    supervisor._DRAIN_MARGIN_S = float(margin)
if sizes := os.environ.get("TOKA_TEST_TOPOLOGY"):
    dp_size, pp_size, tp_size = map(int, sizes.split(","))
    larger = make_topology(RankInfo(dp_size=dp_size, pp_size=pp_size, tp_size=tp_size))
    supervisor.choose_topology = lambda config: larger
if os.environ.get("TOKA_TEST_SUBREAPER"):
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans come to us, as they come to process 1
sys.exit(run(sys.argv[1:], {**MODULES, **NAMES}))

"""A stand-in for kubectl: answers each command line that it is told of, and forwards ports to a server of the test.

`python stub.py WORLD ARGUMENT...`: WORLD is a JSON file with `answers` (command line -> output, or null for a refusal),
`port` (of port-forward) and `log` (a file that gets each command line).
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path


def main() -> int:
    world = json.loads(Path(sys.argv[1]).read_text())
    line = " ".join(sys.argv[2:])
    with Path(world["log"]).open("a") as log:
        log.write(line + "\n")
    if "port-forward" in sys.argv:
        print(f"Forwarding from 127.0.0.1:{world['port']} -> 10210", flush=True)
        signal.pause()
    for pattern, output in world["answers"].items():
        if pattern in line:
            if output is None:
                break
            print(output, flush=True)
            if "--watch" in sys.argv:
                signal.pause()
            return 0
    print(f"Error from server (NotFound): {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

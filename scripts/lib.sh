# Shared by the scripts here; source it, never run it. Sets the repository as the working folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${TOKA_VENV:-.venv}
CACHE=${TOKA_CACHE_DIR:-$HOME/.cache/toka}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac

fail() { echo "error: $*" >&2; exit 1; }

# A Python of the machine that can run the harness: 3.11 or newer, nothing else asked of it.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$candidate"; return; }
  done
  fail "Python 3.11 or newer is needed (apt-get install python3)"
}

# The environment's Python, once scripts/setup has made it.
venv_python() {
  [ -x "$VENV/bin/python" ] || fail "there is no environment at $VENV: run scripts/setup first"
  echo "$VENV/bin/python"
}

# Lets Python keep what it compiles, within the environment and so never beside the sources: without it each process that a
# test starts compiles torch's and our own modules again, 2.6 s of CPU for an engine's four processes.
keep_bytecode() {
  unset PYTHONDONTWRITEBYTECODE
  export PYTHONPYCACHEPREFIX=$VENV/bytecode
}

seconds_since() { echo $(($(date +%s) - $1)); }

# Says what a long script is doing and for how long; source it, never run it. `log` names the file for a step's output.
# On a terminal a step is one line that changes; elsewhere, where lines stay, it gets one a minute.
REPORT_S=${TOKA_REPORT_SECONDS:-60}

# Run a command with its output in $log; show the log's end if it fails, which ends the script.
step() {
  local title=$1 started pid reported=0 elapsed; shift
  started=$(date +%s)
  _say_running "$title" 0 ""
  : >"$log"
  "$@" >"$log" 2>&1 </dev/null & pid=$!
  while kill -0 $pid 2>/dev/null; do
    sleep 0.2
    elapsed=$(seconds_since "$started")
    if [ -t 1 ]; then
      _say_running "$title" "$elapsed" "$(_last_line)"
    elif [ $((elapsed / REPORT_S)) -gt $reported ]; then
      reported=$((elapsed / REPORT_S)); printf '    %3d s  %.90s\n' "$elapsed" "$(_last_line)"
    fi
  done
  wait $pid || { _end_line; printf 'failed after %s s:\n' "$(seconds_since "$started")"; tail -n 40 "$log"; exit 1; }
  _end_line
  printf '%-58s%5d s\n' "$title" "$(seconds_since "$started")"
}

_say_running() {  # TITLE SECONDS DETAIL
  if [ -t 1 ]; then
    local width
    { width=$(stty size <&3 2>/dev/null | cut -d' ' -f2) || width=80; } 3>&1  # 0 where the terminal does not know
    printf '\r\033[K%s' "$(printf '%-58s%5d s  %s' "$@" | cut -c "1-$((width > 1 ? width - 1 : 79))")"
  elif [ "$2" = 0 ]; then
    printf '%s ...\n' "$1"
  fi
}

_end_line() { [ ! -t 1 ] || printf '\r\033[K'; }
_last_line() { tail -n 1 "$log" | tr -d '\r'; }

#!/usr/bin/env bash
# Runs on every machine of a slice; the launcher calls it over ssh.
#
#   setup ARCHIVE EXTRAS             unpacks the tree and installs it with these extras
#   start TAG [NAME=VALUE ...] python -m MODULE ...
#                                    starts the run in the background; a run in the way is ended
#   status                           prints one line: jaxalign-worker TAG running|ended [CODE]
#   log BYTES                        prints the log from there on
#   last                             prints the end of the log, if the run has failed
set -euo pipefail

readonly tree="$HOME/jaxalign" run="$HOME/jaxalign-run"

setup() {
  rm -rf "$tree"
  mkdir -p "$tree"
  tar -xzf "$1" -C "$tree"
  cd "$tree"
  # uv brings the Python that the system of the TPU image is too old for.
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  export PATH="$HOME/.local/bin:$PATH"
  uv venv --quiet --python 3.12 .venv
  uv pip install --quiet --python .venv -c constraints.txt -e ".[$2]"
  # Chips from v5e on are fed faster from large pages.
  echo always | sudo -n tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null || true
}

start() {
  end_old
  rm -rf "$run"
  mkdir -p "$run"
  echo "$1" >"$run/tag"
  shift
  cp "$0" "$run/run_worker.sh"
  setsid nohup bash "$run/run_worker.sh" work "$@" >"$run/log" 2>&1 </dev/null &
  echo "$!" >"$run/pid"
}

# The run itself. A shutdown signals every process: this shell waits for the run to save its state.
work() {
  trap : TERM
  cd "$tree"
  export PATH="$tree/.venv/bin:$PATH"
  local code=0
  env "$@" || code=$?
  echo "$code" >"$run/code.new"
  mv "$run/code.new" "$run/code"
  keep_log "$@"
}

# Beside the run's checkpoints, as the machine's disk goes with the machine.
keep_log() {
  local word before=""
  for word in "$@"; do
    if [[ $before == --workdir && $word == gs://* ]]; then
      gcloud storage cp "$run/log" "$word/logs/$(hostname)-$(date -u +%Y%m%dT%H%M%S).log" || true
    fi
    before="$word"
  done
}

is_alive() {
  [[ -f $run/pid ]] && kill -0 "$(cat "$run/pid")" 2>/dev/null
}

end_old() {
  local left
  for left in TERM KILL; do
    is_alive || return 0
    kill "-$left" -- "-$(cat "$run/pid")" || true
    for _ in {1..300}; do # a minute to save
      is_alive || return 0
      sleep 0.2
    done
  done
}

status() {
  [[ -f $run/tag ]] || return 0
  if [[ -f $run/code ]]; then
    echo "jaxalign-worker $(cat "$run/tag") ended $(cat "$run/code")"
  elif is_alive; then
    echo "jaxalign-worker $(cat "$run/tag") running"
  else
    echo "jaxalign-worker $(cat "$run/tag") ended 137" # gone without a word, as after a reboot
  fi
}

log() {
  [[ ! -f $run/log ]] || tail -c "+$(($1 + 1))" "$run/log"
}

last() {
  [[ -f $run/code && $(cat "$run/code") != 0 ]] || return 0
  echo "--- $(hostname): exit code $(cat "$run/code")"
  tail -n 20 "$run/log"
}

"$@"

#!/bin/sh
# Stages 2 and 3 of tessella-nano on one GPU, meant for ten minutes each, not yet run whole: sh recipes/nano/train.sh TOWER PARTS DATA WORK
# TOWER: folder of tower.py, or a packed tower (src/tessella/assets/nano/tower.safetensors). PARTS: collect.py. DATA: the tars.
# TEXT (optional): JSONL of make_text.py. A stage that was stopped goes on when this is run again.
set -eu
tower=$1 parts=$2 data=$3 work=$4
here=$(dirname "$0")
run() { echo "== $*" >&2; "$@"; }
resume() { [ -d "$1/checkpoints" ] && echo "resume=true" || echo "resume=false"; }
mkdir -p "$work"
[ -d "$work/start" ] || run python "$here/assemble.py" start --tower "$tower" --parts "$parts" --out "$work/start"
[ -f "$work/rows/align.jsonl" ] ||
  run python "$here/make_data.py" --parts "$parts" --data "$data" --out "$work/rows" --stage align --samples "${ALIGN:-60000}"
[ -d "$work/align/adapter" ] || run python "$here/teach.py" "$here/align.toml" --rows "$work/rows/align.jsonl" \
  --set "model=$work/start" "output=$work/align" "$(resume "$work/align")"
[ -d "$work/aligned" ] || run tessella convert "$work/align" "$work/aligned" --to official
[ -f "$work/rows/instruct.jsonl" ] ||
  run python "$here/make_data.py" --parts "$parts" --data "$data" --out "$work/rows" --stage instruct --samples "${INSTRUCT:-500000}"
run python "$here/teach.py" "$here/instruct.toml" --rows "$work/rows/instruct.jsonl" ${TEXT:-} \
  --set "model=$work/aligned" "output=$work/instruct" "time_limit_s=${SECONDS_OF_INSTRUCT:-540}" "$(resume "$work/instruct")"
run python "$here/assemble.py" pack --model "$work/aligned" --adapter "$work/instruct/adapter"

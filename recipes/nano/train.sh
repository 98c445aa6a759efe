#!/bin/sh
# Stages 2 and 3 of tessella-nano on one GPU, ten minutes each at the most: sh recipes/nano/train.sh START PARTS DATA WORK
# START: folder of tower.py, a packed tower, or a model folder (anchor.py). PARTS: collect.py. DATA: the tars.
# TEXT (optional): JSONL of make_text.py. ALIGN, INSTRUCT: samples. SET: fields of the recipes. ASSETS: where the packed weights go.
# A stage that was stopped goes on when this is run again.
set -eu
start=$1 parts=$2 data=$3 work=$4
here=$(dirname "$0")
run() { echo "== $*" >&2; "$@"; }
resume() { [ -d "$1/checkpoints" ] && echo "resume=true" || echo "resume=false"; }
rows() { [ -f "$work/rows/$1.jsonl" ] || run python "$here/make_data.py" --parts "$parts" --data "$data" --out "$work/rows" --stage "$1" --samples "$2"; }
mkdir -p "$work"
if [ ! -f "$start/config.json" ]; then
  [ -d "$work/start" ] || run python "$here/assemble.py" start --tower "$start" --parts "$parts" --out "$work/start"
  start=$work/start
fi
rows align "${ALIGN:-40000}"
[ -d "$work/align/adapter" ] || run python "$here/teach.py" "$here/align.toml" --rows "$work/rows/align.jsonl" \
  --set "model=$start" "output=$work/align" "$(resume "$work/align")" ${SET:-}
[ -d "$work/aligned" ] || run tessella convert "$work/align" "$work/aligned" --to official
rows instruct "${INSTRUCT:-600000}"
[ -d "$work/instruct/adapter" ] || run python "$here/teach.py" "$here/instruct.toml" --rows "$work/rows/instruct.jsonl" ${TEXT:-} \
  --set "model=$work/aligned" "output=$work/instruct" "time_limit_s=${SECONDS_OF_INSTRUCT:-560}" "$(resume "$work/instruct")" ${SET:-}
run python "$here/assemble.py" pack --model "$work/aligned" --adapter "$work/instruct/adapter" ${ASSETS:+--out "$ASSETS"}

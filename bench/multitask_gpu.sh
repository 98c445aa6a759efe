#!/bin/sh
# Boxes, masks and pictures on one GPU: teach for so many seconds, score, and pack what must travel.
# usage: DATA=DIR sh bench/multitask_gpu.sh OUT SECONDS [FROM]
#   DATA   folder with tiny-imagenet-train-0.tar, -1.tar, -val.tar and tiny-imagenet-classes.json: rows that keep the naming, and
#          NAMED (1500) held-out pictures to see it
#   FROM   a folder (or the beginning of the .tar parts' names) of an earlier run's adapter, to go on with it under a new schedule
#   JUDGE  the independent judge's file (evaluate --judge); made when it is not there
#   SET    more flags for finetune; DEVICE (cuda), SCORED scenes (500), PROBE steps (60), RESERVE seconds (160) for scoring
# Steps of a first short run are timed, so that the learning rate of the real one ends just before SECONDS do.
# OUT/back holds what must come back: weights.tar.part-* (15 MiB each) and log.tar; nothing else is needed to score or go on.
set -eu
out=$1 seconds=$2 from=${3:-}
began=$(date +%s)
here=$(cd "$(dirname "$0")/.." && pwd)
device=${DEVICE:-cuda} scored=${SCORED:-500} named=${NAMED:-1500} probe=${PROBE:-60}
export PYTHONUNBUFFERED=1
say() { echo "== $(($(date +%s) - began)) s: $*" >&2; }
mkdir -p "$out/back"
say "$(git -C "$here" log -1 --format=%h 2>/dev/null || echo 'no git')"

rows=$out/rows/rows.jsonl
[ -f "$rows" ] || python3 "$here/recipes/nano/naming_rows.py" --data "$DATA" --out "$out/rows" --rows "${ROWS:-24000}" --held-out "$named"
going_on=""
if [ -n "$from" ]; then
  if [ ! -d "$from" ]; then
    mkdir -p "$out/from" && cat "$from"* | tar -xf - -C "$out/from" && from=$out/from/adapter
  fi
  going_on="--model $from --further same --seed 1"
fi
teach() {  # WHERE, then flags
  where=$1; shift
  # shellcheck disable=SC2086  # several words each
  tessella finetune "$here/recipes/multitask.toml" --data "$rows" --repeat 2 --held-out 0 $going_on --device "$device" ${SET:-} \
    --output "$where" "$@"
}
say "probe of $probe steps"
teach "$out/probe" --max-steps "$probe" --report-every "$((probe / 4))" --held-out-scenes 0 --sample-answers 0 --time-limit-s 120 \
  --json "$out/back/probe.json" 2>&1 | tail -n 12
reserve=${RESERVE:-160}  # for opening, the last look, scoring and packing
opening=${OPENING:-20}  # of the budget, before the first step
budget=$((seconds - ($(date +%s) - began) - reserve))
steps=$(python3 "$here/bench/steps_in.py" "$out/probe/metrics.jsonl" "$((budget - opening))")
say "$steps steps in $budget s"
teach "$out/run" --max-steps "$steps" --report-every 25 --time-limit-s "$budget" --json "$out/back/finetune.json" 2>&1 \
  | tee "$out/finetune.log" | grep -v '^$' | tail -n 40
say "pack"
cp "$out/run/metrics.jsonl" "$out/run/run.json" "$out/finetune.log" "$out/back/"
python3 "$here/bench/pack_adapter.py" "$out/run/adapter" "$out/packed/adapter"
tar -cf - -C "$out/packed" adapter | split -b 15m - "$out/back/weights.tar.part-"
left() { echo $((seconds - 6 - ($(date +%s) - began))); }
if [ "$scored" -gt 0 ]; then
  say "score $scored scenes, $(left) s left"
  kinds="detect everything ground segment text name count talk draw edit"
  # shellcheck disable=SC2086
  timeout "$(left)" tessella evaluate "$out/packed/adapter" --scenes "$scored" --scene-kinds $kinds ${JUDGE:+--judge "$JUDGE"} \
    ${SCORE_SET:-} --batch-items 128 --device "$device" --html "$out/back/scenes.html" --json "$out/back/scores.json" \
    || say "not scored: score it where the weights travel to"
fi
if [ "$named" -gt 0 ] && [ "$(left)" -gt 10 ]; then
  say "naming, $(left) s left"
  timeout "$(left)" tessella evaluate "${BASE:-tessella-nano}" "$out/packed/adapter" --data "$out/rows/naming.jsonl" --batch-items 250 \
    --device "$device" --output "$out/naming" --json "$out/back/naming.json" || say "naming not scored"
fi
mkdir -p "$out/log" && find "$out/back" -type f ! -name 'weights.tar.part-*' -exec mv {} "$out/log/" \;
tar -czf "$out/back/log.tar" -C "$out" log
ls -l "$out/back" >&2
say "done"

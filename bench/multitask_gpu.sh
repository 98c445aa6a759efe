#!/bin/sh
# Boxes, masks and pictures on one GPU: teach for at most SECONDS (run it again to go on), then score every bar of the issue.
# usage: sh bench/multitask_gpu.sh OUT SECONDS     three runs of 580 s are what the recipe is made for
# Rows go to OUT/scores.json; the plain naming score before and after goes to OUT/skills-*.json when SKILLS names the folder
# that recipes/nano/make_data.py --stage skills wrote.
set -eu
out=$1 seconds=$2
mkdir -p "$out"
resume=""
[ -d "$out/run/checkpoints" ] && resume="--resume"
kinds="detect everything ground segment text name name count talk draw edit"
tessella finetune recipes/multitask.toml --decoders boxes pictures --scene-kinds $kinds \
  --output "$out/run" --time-limit-s "$seconds" --device cuda $resume --json "$out/finetune.json"
tessella evaluate "$out/run" --scenes 500 --scene-kinds detect everything ground segment text name count talk draw edit --device cuda --html "$out/scenes.html" --json "$out/scores.json"
if [ -n "${SKILLS:-}" ]; then
  tessella evaluate tessella-nano "$out/run" --skills --data "$SKILLS" --limit 1000 --device cuda --json "$out/skills.json"
fi
du -b "$out/run/adapter/routing/"*.safetensors

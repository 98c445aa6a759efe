#!/usr/bin/env bash
# One run on one machine or many, under torchrun. Run it on each machine; all see the same recipe, data and output folder.
#
#   sh recipes/launch/torchrun.sh recipes/mine.toml --parallel fsdp2                      one machine, all its GPUs
#   NODES=2 HEAD=gpu-1 sh recipes/launch/torchrun.sh recipes/mine.toml --parallel fsdp2   on each of two machines
#
# GPUS: processes a machine (default: as many as there are GPUs).  HEAD: name of the machine whose rank 0 reads and writes.
# PORT: a free one there.  PYTHON: which Python has tessella.
set -euo pipefail
PYTHON=${PYTHON:-python}
GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}
if [ "${NODES:-1}" = 1 ]; then
  where=(--standalone)
else
  where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name the machine that rank 0 runs on}:${PORT:-29400}" --rdzv-id tessella)
fi
exec "$PYTHON" -m torch.distributed.run "${where[@]}" --nproc-per-node "$GPUS" -m tessella.cli finetune "$@"

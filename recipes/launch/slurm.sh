#!/usr/bin/env bash
#SBATCH --job-name=tessella
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tessella-%j.log
#
#   sbatch recipes/launch/slurm.sh recipes/mine.toml --parallel fsdp2
#
# One torchrun a machine. Five minutes before the time is up SLURM sends SIGTERM: the run saves, and the job is queued again and
# goes on. The output folder must lie on a disk that all machines see.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this file is for sbatch}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES=$SLURM_JOB_NUM_NODES HEAD=$head PORT=$((20000 + SLURM_JOB_ID % 20000)) GPUS=$SLURM_GPUS_ON_NODE
stopped=0
trap 'stopped=1; kill -TERM "$job"' TERM
# --resume begins anew where there is nothing to go on from.
srun --kill-on-bad-exit=1 bash recipes/launch/torchrun.sh "$@" --resume &
job=$!
code=0
wait "$job" || code=$?
if [ "$stopped" = 1 ]; then
  wait "$job" || true # the first wait was ended by the signal, not by the run
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"

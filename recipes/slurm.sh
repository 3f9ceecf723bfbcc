#!/bin/bash
# A job for Slurm on four nodes of eight cards (not tried yet); started again, it goes on.
#
#   sbatch recipes/slurm.sh recipes/stage1.sh prologue_b
#
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 --requeue
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export LAUNCH="torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint $host:29500"
srun --cpus-per-task=64 "$@"

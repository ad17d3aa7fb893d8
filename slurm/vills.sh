#!/bin/bash
#SBATCH --job-name=cion-vills
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# Pre-train one encoder for images and clips on tracklets with masks of body parts (VILLS), with eight GPUs or on what
# you ask for instead; submit from the checkout.
#
#   sbatch slurm/vills.sh data=/data/tracklets.parquet data_root=/data/videos parts=/data/parts backbone=vit_small [NAME=VALUE …]
#   bash slurm/vills.sh …                                   # the same after looking at settings and data, with account and partition of slurm/settings.sh
#   DEVICE=cpu bash slurm/vills.sh profile=small            # CPUs (with sbatch itself: DEVICE=cpu sbatch --gres=none …)
#
# NAME=VALUE are settings of the recipe, beside profile= (default: paper). PROCESSES is the number of processes a node:
# by default one a GPU, or one on CPUs. Two minutes before the time limit, or when it is preempted, the job writes a
# checkpoint and goes back into the queue; the next start goes on from there, and so does the same command given again.
# On another number of processes it refuses to, since bits would differ, unless the environment has CION_NB_RESUME=anyway.
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" vills "$0" "$@"

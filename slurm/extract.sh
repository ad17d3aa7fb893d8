#!/bin/bash
#SBATCH --job-name=cion-extract
#SBATCH --nodes=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# Features of many images with one GPU; submit from the checkout.
#
#   sbatch slurm/extract.sh tracks/samples.parquet --model backbone.safetensors --out features [--set NAME=VALUE …]
#   bash slurm/extract.sh …                                    # the same after looking at table and model
#   DEVICE=cpu bash slurm/extract.sh …                         # CPUs (with sbatch itself: DEVICE=cpu sbatch --gres=none …)
#
# What follows the script is what follows `cion_nb extract`. Before the time limit, or when it is preempted, the job
# goes back into the queue; rows that were written are not computed again.
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" extract "$0" "$@"

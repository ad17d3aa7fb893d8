#!/bin/bash
#SBATCH --job-name=cion-find
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A_%a.out
#
# Find every person in frames or in a folder of videos, on several machines that share a file system; submit from the
# checkout, by bash:
#
#   SHARDS=8 bash slurm/find.sh --profile paper --set data=videos data_root=/data/kinetics model=runs/idfree-…
#   DEVICE=cpu SHARDS=8 bash slurm/find.sh …                   # without GPUs
#
# Submits an array whose jobs share the videos, and after it one that joins what they found. What follows the script is
# what follows `cion_nb find`. Submitted again, it goes on where it was.
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" find "$0" "$@"

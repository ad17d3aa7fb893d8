#!/bin/bash
#SBATCH --job-name=cion-track
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A_%a.out
#
# Track many videos on several machines that share a file system; submit from the checkout, by bash:
#
#   SHARDS=8 bash slurm/track.sh videos/*.mp4 --out tracks --detector yolox.onnx
#   DEVICE=cpu SHARDS=8 bash slurm/track.sh …                  # without GPUs
#
# Submits an array whose jobs share the videos, and after it one that joins their tables into tracks/samples.parquet.
# What follows the script is what follows `cion_nb track`. Submitted again, it goes on where it was.
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" track "$0" "$@"

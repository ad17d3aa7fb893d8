#!/bin/bash
#SBATCH --job-name=cion-denoise
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A_%a.out
#
# Denoise a large set on several machines that share a file system; submit from the checkout, by bash:
#
#   SHARDS=8 bash slurm/denoise.sh features.npy samples.parquet out/ [NAME=VALUE …]
#   SHARDS=8 SBATCH="sbatch --partition=cpu --account=me" bash slurm/denoise.sh …
#
# Submits three jobs, each after the one before: an array over videos (Eq. 4-6), an array over the chunks of
# Eq. 7, and one that merges the links. NAME=VALUE are settings of `denoise`, e.g. half_width=null sigma_drm=0.3.
# Submitted again, it goes on where it was. The labels are those of a single process:
#   cion_nb denoise features.npy samples.parquet --out out/
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" denoise "$0" "$@"

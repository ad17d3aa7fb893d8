#!/bin/bash
#SBATCH --job-name=cion-denoise
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A_%a.out
#
# Denoise a large set on several machines that share a file system.
#
#   SHARDS=8 bash slurm/denoise.sh features.npy samples.parquet out/ [NAME=VALUE …]
#   SHARDS=8 SBATCH="sbatch --partition=cpu --account=me" bash slurm/denoise.sh …
#
# Submits three jobs, each after the one before: an array over videos (Eq. 4-6), an array over the chunks of
# Eq. 7, and one that merges the links. NAME=VALUE are settings of `denoise`, e.g. half_width=null sigma_drm=0.3.
# Submitted again, it goes on where it was. The labels are those of a single process:
#   python -m cion_nb denoise features.npy samples.parquet --out out/
set -euo pipefail
if [ $# -lt 3 ]; then echo "usage: [SHARDS=8] bash $0 features.npy samples.parquet out/ [NAME=VALUE …]" >&2; exit 2; fi
SHARDS=${SHARDS:-8}
[[ $SHARDS =~ ^[1-9][0-9]*$ ]] || { echo "$0: SHARDS=$SHARDS: a number of machines, 1 or more" >&2; exit 2; }
settings=${SETTINGS:-slurm/settings.sh}                        # account, partition, environment: see settings.example.sh
if [ -f "$settings" ]; then . "$settings"; fi
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
features=$1 samples=$2 out=$3; shift 3

if [ -z "${STEP:-}" ]; then
    settings=(); [ $# -eq 0 ] || settings=(--set "$@")
    "$PYTHON" -m cion_nb denoise "$features" "$samples" --out "$out" --check ${settings[@]+"${settings[@]}"}      # before anything waits in a queue
    submit() { ${SBATCH:-sbatch} --parsable "$@"; }
    array=--array=0-$((SHARDS - 1))
    job() { echo "ALL,STEP=$1,SHARDS=$SHARDS,PYTHON=$PYTHON"; }
    videos=$(submit "$array" --export="$(job videos)" "$0" "$features" "$samples" "$out" "$@")
    links=$(submit "$array" --dependency=afterok:"${videos%%;*}" --export="$(job links)" "$0" "$features" "$samples" "$out" "$@")
    merge=$(submit --dependency=afterok:"${links%%;*}" --export="$(job merge)" "$0" "$features" "$samples" "$out" "$@")
    echo "submitted: videos ${videos%%;*}, links ${links%%;*}, merge ${merge%%;*}"
    exit
fi

command=("$PYTHON" -m cion_nb denoise "$features" "$samples" --out "$out")
[ "$STEP" = merge ] || command+=(--step "$STEP" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS")
[ $# -eq 0 ] || command+=(--set "$@")
echo "${command[@]}"
exec "${command[@]}"

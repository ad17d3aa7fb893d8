#!/bin/bash
#SBATCH --job-name=cion-idfree
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
# Train a detector that embeds on boxes without identities (method=image), then on videos (method=video), with eight GPUs
# or on what you ask for instead; submit from the checkout.
#
#   sbatch slurm/idfree.sh data=coco,crowdhuman data_root=/data/det method=image [NAME=VALUE …]
#   bash slurm/idfree.sh …                                   # the same after looking at settings and data, with account and partition of slurm/settings.sh
#   DEVICE=cpu bash slurm/idfree.sh profile=small            # CPUs (with sbatch itself: DEVICE=cpu sbatch --gres=none …)
#
# NAME=VALUE are settings of the recipe, beside profile= (default: paper). PROCESSES is the number of processes a node:
# by default one a GPU, or one on CPUs. Two minutes before the time limit, or when it is preempted, the job writes a
# checkpoint and goes back into the queue; the next start goes on from there, and so does the same command given again.
# On another number of processes it refuses to, since bits would differ, unless the environment has CION_NB_RESUME=anyway.
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" idfree "$0" "$@"

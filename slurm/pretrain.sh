#!/bin/bash
#SBATCH --job-name=cion-pretrain
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
# Pre-train on one node of 8 GPUs, or on what you ask for instead; submit from the checkout.
#
#   sbatch slurm/pretrain.sh data_root=/data/CION_AL annotation=/data/CION_AL/cional_annos.json [NAME=VALUE …]
#   sbatch --nodes=4 slurm/pretrain.sh …                       # 32 GPUs
#   bash slurm/pretrain.sh …                                   # the same after checking the settings, with account and partition of slurm/settings.sh
#   DEVICE=cpu bash slurm/pretrain.sh profile=small            # CPUs (with sbatch itself: DEVICE=cpu sbatch --gres=none …)
#
# NAME=VALUE are settings of the recipe, beside profile= (default: paper). PROCESSES is the number of processes a node:
# by default one a GPU, or one on CPUs. Two minutes before the time limit, or when it is preempted, the job writes a
# checkpoint and goes back into the queue; the next start goes on from there, and so does the same command given again.
# On another number of processes it refuses to, since bits would differ, unless the environment has CION_NB_RESUME=anyway.
set -euo pipefail
[ -z "${SLURM_JOB_ID:-}" ] || cd "$SLURM_SUBMIT_DIR"
settings=${SETTINGS:-slurm/settings.sh}
if [ -f "$settings" ]; then . "$settings"; fi
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)} DEVICE=${DEVICE:-gpu}
[[ $DEVICE =~ ^(gpu|cpu)$ ]] || { echo "$0: DEVICE=$DEVICE: gpu or cpu" >&2; exit 2; }
profile=paper changes=()
for a in "$@"; do
    [[ $a == *=* ]] || { echo "usage: sbatch $0 [profile=PROFILE] [NAME=VALUE …], not $a" >&2; exit 2; }
    if [[ $a == profile=* ]]; then profile=${a#*=}; else changes+=("$a"); fi
done
if [ "$profile" = paper ] && [ -n "${DATA_ROOT:-}" ]; then changes=("data_root=$DATA_ROOT" ${changes[@]+"${changes[@]}"}); fi
arguments=(--profile "$profile" --set ${changes[@]+"${changes[@]}"})

if [ -z "${SLURM_JOB_ID:-}" ]; then                            # not in a job yet: check the settings before anything waits in a queue
    "$PYTHON" -m cion_nb pretrain --check "${arguments[@]}" > /dev/null
    if [ "$DEVICE" = cpu ]; then export SBATCH_GRES=${SBATCH_GRES:-none}; fi
    export DEVICE PYTHON
    exec ${SBATCH:-sbatch} "$0" "$@"
fi

# ---- in the job, on its first node
case $DEVICE in
    gpu) PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-0}}
         [ "$PROCESSES" -gt 0 ] || { echo "$0: this allocation has no GPU; ask for some (--gres=gpu:8), or set DEVICE=cpu" >&2; exit 2; } ;;
    cpu) PROCESSES=${PROCESSES:-1}; export ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES= ;;      # `accelerate launch --cpu` would start one process
esac
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol -o show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')              # what SLURM itself reaches it by
WORLD=$((SLURM_NNODES * PROCESSES)) ADDRESS=${address:-$first} PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export PYTHON PROCESSES WORLD ADDRESS PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + PROCESSES - 1) / PROCESSES))} CION_NB_PROGRESS=${CION_NB_PROGRESS:-30}
echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $WORLD process(es) on $SLURM_JOB_NODELIST, pretrain ${arguments[*]}"

# What the recipe starts from, where it can be made here (the embedded world and its identities); at `paper` this only says what is missing.
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || "$PYTHON" -m cion_nb pretrain --dependencies "${arguments[@]}"

asked= stopped=
ask() { while kill -0 "$step" 2>/dev/null; do scancel --signal=USR1 "$SLURM_JOB_ID" || true; sleep 10; done; }      # again, for processes that were still starting
trap 'asked=yes; ask &' USR1                                   # the time limit is near (#SBATCH --signal)
trap 'stopped=yes' TERM                                        # cancelled or preempted: SLURM tells the processes itself, and they write their checkpoint
# The launcher must outlive USR1, which its processes answer; a signal that is ignored stays so in what is started.
srun --mpi=none --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c 'trap "" USR1
    several=(); [ "$WORLD" -eq 1 ] || several=(--multi_gpu)
    exec "$PYTHON" -m accelerate.commands.launch ${several[@]+"${several[@]}"} --num_machines "$SLURM_NNODES" --num_processes "$WORLD" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$ADDRESS" --main_process_port "$PORT" --rdzv_backend static \
        --mixed_precision no --dynamo_backend no -m cion_nb pretrain "$@"' pretrain "${arguments[@]}" &
step=$!
while :; do                                                    # a signal ends `wait` before srun ends
    code=0; wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || break
done
if [ "$code" -ne 0 ] && [ -n "$asked" ]; then
    echo "$(date '+%F %T') stopped before the time limit: back into the queue"
    if scontrol requeue "$SLURM_JOB_ID"; then trap - TERM; sleep 120; fi      # SLURM ends this start; a script that ended first would be a failed job
    echo "this cluster does not requeue: submit the same command again, it goes on from the checkpoint" >&2
    exit 75
fi
[ "$code" -eq 0 ] || [ -z "$stopped" ] || exit 75
exit "$code"

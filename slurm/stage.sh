#!/bin/bash
# The body of all job scripts: slurm/STAGE.sh calls it as `stage.sh STAGE SCRIPT ARGUMENTS…`, outside a job and inside.
#
# Outside (`bash slurm/pretrain.sh …`): look at settings and data, then submit SCRIPT. Inside, on the job's first node: run the stage.
# SCRIPT keeps its own #SBATCH lines, since sbatch runs a copy of it that lies elsewhere.
set -euo pipefail
stage=$1 script=$2; shift 2
[ -z "${SLURM_JOB_ID:-}" ] || cd "$SLURM_SUBMIT_DIR"
settings=${SETTINGS:-slurm/settings.sh}                        # account, partition, environment: see settings.example.sh
if [ -f "$settings" ]; then . "$settings"; fi
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)} DEVICE=${DEVICE:-gpu}
[[ $DEVICE =~ ^(gpu|cpu)$ ]] || { echo "$script: DEVICE=$DEVICE: gpu or cpu" >&2; exit 2; }
say() { echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }
submit() { ${SBATCH:-sbatch} "$@"; }
cion_nb() { "$PYTHON" -m cion_nb "$@"; }

# ---- a training: settings of its recipe, several processes
training() {
    local profile=paper changes=() a
    for a in "$@"; do
        [[ $a == *=* ]] || { echo "usage: sbatch $script [profile=PROFILE] [NAME=VALUE …], not $a" >&2; exit 2; }
        if [[ $a == profile=* ]]; then profile=${a#*=}; else changes+=("$a"); fi
    done
    if [ "$profile" = paper ] && [ -n "${DATA_ROOT:-}" ]; then changes=("data_root=$DATA_ROOT" ${changes[@]+"${changes[@]}"}); fi
    arguments=(--profile "$profile" --set ${changes[@]+"${changes[@]}"})
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        cion_nb "$stage" --check "${arguments[@]}" > /dev/null
        if [ "$DEVICE" = cpu ]; then export SBATCH_GRES=${SBATCH_GRES:-none}; fi
        export DEVICE PYTHON
        exec ${SBATCH:-sbatch} "$script" "$@"
    fi
    case $DEVICE in
        gpu) PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-0}}
             [ "$PROCESSES" -gt 0 ] || { echo "$script: this allocation has no GPU; ask for some (--gres=gpu:8), or set DEVICE=cpu" >&2; exit 2; } ;;
        cpu) PROCESSES=${PROCESSES:-1}; export ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES= ;;      # `accelerate launch --cpu` would start one process
    esac
    local first address
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol -o show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')          # what SLURM itself reaches it by
    WORLD=$((SLURM_NNODES * PROCESSES)) ADDRESS=${address:-$first} PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    export PYTHON PROCESSES WORLD ADDRESS PORT STAGE=$stage
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + PROCESSES - 1) / PROCESSES))} CION_NB_PROGRESS=${CION_NB_PROGRESS:-30}
    say "$WORLD process(es) on $SLURM_JOB_NODELIST, $stage ${arguments[*]}"
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || cion_nb "$stage" --check "${arguments[@]}" > /dev/null
    # What the recipe starts from, where it can be made here (the embedded world and its identities); at `paper` this only says what is missing.
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || cion_nb "$stage" --dependencies "${arguments[@]}"
    launch
}

launch() {
    asked= stopped=
    ask() { while kill -0 "$step" 2>/dev/null; do scancel --signal=USR1 "$SLURM_JOB_ID" || true; sleep 10; done; }      # again, for processes that were still starting
    trap 'asked=yes; ask &' USR1                               # the time limit is near (#SBATCH --signal)
    trap 'stopped=yes' TERM                                    # cancelled or preempted: SLURM tells the processes itself, and they write their checkpoint
    # The launcher must outlive USR1, which its processes answer; a signal that is ignored stays so in what is started.
    srun --mpi=none --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c 'trap "" USR1
        several=(); [ "$WORLD" -eq 1 ] || several=(--multi_gpu)
        exec "$PYTHON" -m accelerate.commands.launch ${several[@]+"${several[@]}"} --num_machines "$SLURM_NNODES" --num_processes "$WORLD" \
            --machine_rank "$SLURM_NODEID" --main_process_ip "$ADDRESS" --main_process_port "$PORT" --rdzv_backend static \
            --mixed_precision no --dynamo_backend no -m cion_nb "$STAGE" "$@"' "$stage" "${arguments[@]}" &
    step=$!
    local code
    while :; do                                                # a signal ends `wait` before srun ends
        code=0; wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    if [ "$code" -ne 0 ] && [ -n "$asked" ]; then again; fi
    [ "$code" -eq 0 ] || [ -z "$stopped" ] || exit 75
    exit "$code"
}

again() {
    echo "$(date '+%F %T') stopped before the time limit: back into the queue"
    if scontrol requeue "$SLURM_JOB_ID"; then trap - TERM; sleep 120; fi      # SLURM ends this start; a script that ended first would be a failed job
    echo "this cluster does not requeue: submit the same command again, it goes on from the checkpoint" >&2
    exit 75
}

# ---- one process whose work survives being killed: the command as it stands, back into the queue before the time limit
single() {
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        cion_nb "$stage" --check "$@" > /dev/null
        if [ "$DEVICE" = cpu ]; then export SBATCH_GRES=${SBATCH_GRES:-none}; fi
        export DEVICE PYTHON
        exec ${SBATCH:-sbatch} "$script" "$@"
    fi
    if [ "$DEVICE" = cpu ]; then export CUDA_VISIBLE_DEVICES=; fi
    export CION_NB_PROGRESS=${CION_NB_PROGRESS:-30}
    say "$stage $*"
    cion_nb "$stage" --check "$@" > /dev/null
    asked=
    trap 'asked=yes; kill -TERM "$step" 2>/dev/null || true' USR1
    "$PYTHON" -m cion_nb "$stage" "$@" &
    step=$!
    local code
    while :; do code=0; wait "$step" || code=$?; kill -0 "$step" 2>/dev/null || break; done
    if [ "$code" -ne 0 ] && [ -n "$asked" ]; then again; fi
    exit "$code"
}

# ---- denoising: an array over videos (Eq. 4-6), an array over the chunks of Eq. 7, and one job that merges
denoising() {
    if [ $# -lt 3 ]; then echo "usage: [SHARDS=8] bash $script features.npy samples.parquet out/ [NAME=VALUE …]" >&2; exit 2; fi
    SHARDS=${SHARDS:-8}
    [[ $SHARDS =~ ^[1-9][0-9]*$ ]] || { echo "$script: SHARDS=$SHARDS: a number of machines, 1 or more" >&2; exit 2; }
    local files=("$1" "$2" --out "$3") given=("$@") changes=(); shift 3
    [ $# -eq 0 ] || changes=(--set "$@")
    if [ -z "${STEP:-}" ]; then
        cion_nb denoise "${files[@]}" --check ${changes[@]+"${changes[@]}"}
        local array=--array=0-$((SHARDS - 1)) videos links merge
        job() { echo "ALL,STEP=$1,SHARDS=$SHARDS,PYTHON=$PYTHON"; }
        videos=$(submit --parsable "$array" --export="$(job videos)" "$script" "${given[@]}")
        links=$(submit --parsable "$array" --dependency=afterok:"${videos%%;*}" --export="$(job links)" "$script" "${given[@]}")
        merge=$(submit --parsable --dependency=afterok:"${links%%;*}" --export="$(job merge)" "$script" "${given[@]}")
        echo "submitted: videos ${videos%%;*}, links ${links%%;*}, merge ${merge%%;*}"
        exit
    fi
    local command=("$PYTHON" -m cion_nb denoise "${files[@]}")
    [ "$STEP" = merge ] || command+=(--step "$STEP" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS")
    command+=(${changes[@]+"${changes[@]}"})
    echo "${command[@]}"
    exec "${command[@]}"
}

# ---- tracking and finding: an array that shares the videos (or frames), and one job that joins their tables
sharing() {
    SHARDS=${SHARDS:-8}
    [[ $SHARDS =~ ^[1-9][0-9]*$ ]] || { echo "$script: SHARDS=$SHARDS: a number of machines, 1 or more" >&2; exit 2; }
    if [ -z "${STEP:-}" ]; then
        cion_nb "$stage" --check "$@" > /dev/null
        if [ "$DEVICE" = cpu ]; then export SBATCH_GRES=${SBATCH_GRES:-none}; fi
        job() { echo "ALL,STEP=$1,SHARDS=$SHARDS,PYTHON=$PYTHON,DEVICE=$DEVICE"; }
        local videos join
        videos=$(submit --parsable --array=0-$((SHARDS - 1)) --export="$(job videos)" "$script" "$@")
        join=$(submit --parsable --dependency=afterok:"${videos%%;*}" --export="$(job join)" "$script" "$@")
        echo "submitted: videos ${videos%%;*}, join ${join%%;*}"
        exit
    fi
    if [ "$DEVICE" = cpu ]; then export CUDA_VISIBLE_DEVICES=; fi
    local command=("$PYTHON" -m cion_nb "$stage" "$@")
    [ "$STEP" = join ] || command+=(--shard "$SLURM_ARRAY_TASK_ID/$SHARDS")
    echo "${command[@]}"
    exec "${command[@]}"
}

case $stage in
    pretrain|finetune|usl|uda|video_reid|idfree|vills) training "$@" ;;
    denoise) denoising "$@" ;;
    track|find) sharing "$@" ;;
    extract) single "$@" ;;
    *) echo "stage.sh: no stage $stage: pretrain, finetune, usl, uda, video_reid, idfree, vills, denoise, track, extract or find" >&2; exit 2 ;;
esac

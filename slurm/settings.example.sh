# Copy to slurm/settings.sh (which git ignores) and fill in. The job scripts source it, when you submit and in the job.
# A value that is already in the environment wins, so `DEVICE=cpu bash slurm/pretrain.sh …` works whatever stands here.

# What sbatch asks for: any of its SBATCH_… variables; they win over a script's #SBATCH lines, and options of sbatch win over them.
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal

# The environment: modules, conda, or just the Python that cion_nb is installed in (default: .venv/bin/python of the checkout).
# module load cuda
# : "${PYTHON:=/home/me/cion_nb/.venv/bin/python}"

# Data root of `--profile paper`, and where runs are kept: on a file system that all nodes share.
# : "${DATA_ROOT:=/data/CION_AL}"
# export CION_NB_RUNS="${CION_NB_RUNS:-/scratch/$USER/cion_nb-runs}"

# gpu (every GPU of the allocation) or cpu.
# : "${DEVICE:=gpu}"

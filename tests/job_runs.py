"""Runs of jobs/training_job.py, each in a process of its own."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from places import JOBS

from cion_nb.core.runs import Run

JOB = JOBS / "training_job.py"


def job(folder, *args, processes=1, check=True, start_new_session=False, **env):
    "Run the job in its own process(es); returns the finished process."
    launch = [sys.executable, str(JOB)] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
        "--master_port", str(random.randint(20000, 40000)), str(JOB)]
    env = os.environ | dict(OMP_NUM_THREADS="1", CION_NB_PROGRESS="0", ACCELERATE_USE_CPU="true") | env
    p = subprocess.run([*launch, str(folder), *map(str, args)], env=env, capture_output=True, text=True, timeout=240,
                       start_new_session=start_new_session)
    if check: assert p.returncode == 0, p.stderr[-3000:]
    return p


def said(p): return json.loads(p.stdout.splitlines()[-1])


def RUN(folder): return Run(dict(stage="job", profile="test"), folder)


def ends(folder, rank=0): return torch.load(Path(folder) / f"end-{rank}.pt", weights_only=True)


def assert_same(a, b):
    for module in a:
        for key in a[module]: assert torch.equal(a[module][key], b[module][key]), f"{module}.{key} differs"

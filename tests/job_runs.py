"""Runs of jobs/training_job.py, each in a process of its own."""
import json
import os
from pathlib import Path

import forked
import torch
from places import JOBS

from cion_nb.core.runs import Run

JOB = JOBS / "training_job.py"


def job(folder, *args, processes=1, check=True, start_new_session=False, **env):
    "Run the job in its own process(es); returns the finished process."
    command = [str(JOB), str(folder), *map(str, args)]
    env = os.environ | dict(OMP_NUM_THREADS="1", CION_NB_PROGRESS="0", ACCELERATE_USE_CPU="true") | env
    if processes == 1: p = forked.run(command, env=env, start_new_session=start_new_session)
    else: p = forked.run_ranks(processes, command, env=env)
    if check: assert p.returncode == 0, p.stderr[-3000:]
    return p


def said(p): return json.loads(p.stdout.splitlines()[-1])


def RUN(folder): return Run(dict(stage="job", profile="test"), folder)


def ends(folder, rank=0): return torch.load(Path(folder) / f"end-{rank}.pt", weights_only=True)


def assert_same(a, b):
    for module in a:
        for key in a[module]: assert torch.equal(a[module][key], b[module][key]), f"{module}.{key} differs"

"""Two processes with two streams: one run by the command, the centre of all ranks, the same bits after a SIGKILL; the
job script."""
import json
import os
import subprocess

import forked
import pytest
import vills_examples
from places import ROOT
from vills_examples import asked

from cion_nb.core.runs import Run

RANKS = dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CION_NB_PROGRESS="0")

STEPS = """
import json, os, signal, sys, torch
from cion_nb.semantics.vills import Vills, vills
from cion_nb.training.distill import IdentityGuidedLoss
inner, seen = IdentityGuidedLoss.against, []
def looks(self, student, teacher, pairs, weight=None):
    "The centre is that of all ranks' outputs, weighted by presence."
    before, w = self.centre.clone(), torch.ones(teacher.shape[1]) if weight is None else weight
    found = inner(self, student, teacher, pairs, weight)
    own = torch.cat([(teacher * w[:, None]).sum((0, 1)), len(teacher) * w.sum()[None]])
    every = own.clone()
    torch.distributed.all_reduce(every)
    want = .9 * before + .1 * every[:-1] / every[-1] if every[-1] else before
    assert torch.allclose(self.centre, want, atol=1e-6), (self.centre - want).abs().max()
    seen.append(bool(every[-1] > own[-1]) and not torch.allclose(own[:-1] / own[-1], every[:-1] / every[-1], atol=1e-6))
    return found
follows = Vills.after_step
def dies(self, share):
    follows(self, share)
    if share >= .6: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "looks": IdentityGuidedLoss.against = looks
if sys.argv[2] == "dies": Vills.after_step = dies
run = vills(json.load(open(sys.argv[1])))
if sys.argv[2] == "looks": print(sum(seen), len(seen))
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    "A script that trains, and the recipe it is given."
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    data = vills_examples.make(tmp_path)
    (tmp_path / "steps.py").write_text(STEPS)
    r = asked(data, checkpoint_minutes=0)
    (tmp_path / "recipe.json").write_text(json.dumps(r))
    return r, [tmp_path / "steps.py", tmp_path / "recipe.json"]


def start(files, how, runs):
    return forked.run_ranks(2, [*files[1], how], env=os.environ | RANKS | dict(CION_NB_RUNS=str(runs)))


@pytest.mark.slow("starts processes")
def test_two_processes_share_a_centre_and_survive_a_kill(files, tmp_path):
    r, runs = files[0], tmp_path / "runs"
    assert start(files, "dies", runs).returncode != 0 and not Run(r).is_done
    p = start(files, "looks", runs)
    assert p.returncode == 0, p.stderr[-3000:]
    differ, calls = map(int, p.stdout.split()[-2:])
    assert calls >= 10 and differ > calls / 2, "each rank's own outputs are others"
    p = start(files, "lives", tmp_path / "through")
    assert p.returncode == 0, p.stderr[-3000:]
    through = Run(r, tmp_path / "through" / Run(r).name)
    assert (Run(r).result["resumed"], through.result["resumed"]) == (1, 0) and through.result["processes"] == 2
    for name in ("backbone.safetensors", "resampler.safetensors"):
        assert (Run(r).folder / name).read_bytes() == (through.folder / name).read_bytes(), name


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("args, word", [((), "submitted slurm/vills.sh profile=smoke"),
                                        (("lambda_lse=-1",), "lambda_lse=-1"), (("sead=1",), "did you mean 'seed'")])
def test_the_job_script_looks_before_it_submits(args, word):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))} | RANKS | dict(
        SBATCH="echo submitted", PYTHON=forked.executable(), PYTHONPATH=str(ROOT), SETTINGS="/dev/null/none",
        DEVICE="cpu")
    p = subprocess.run(["bash", "slurm/vills.sh", "profile=smoke", *args], cwd=ROOT, env=env, capture_output=True,
                       text=True, timeout=120)
    assert word in p.stdout + p.stderr and p.returncode == (2 if args else 0), p.stderr

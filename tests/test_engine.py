"""Killed and resumed runs end bit for bit where uninterrupted ones do; real processes, real signals."""
import os, random, signal, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from cion_nb.engine import Position, Preempted, Task, batches, budget, fit, last_checkpoint
from cion_nb.runs import Run

JOB = Path(__file__).with_name("training_job.py")


def job(folder, *args, processes=1, check=True, **env):
    "Run the job in its own process(es); returns the finished process."
    launch = [sys.executable, str(JOB)] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(random.randint(20000, 40000)), str(JOB)]
    env = os.environ | dict(OMP_NUM_THREADS="1", CION_NB_PROGRESS="0", ACCELERATE_USE_CPU="true") | env
    p = subprocess.run([*launch, str(folder), *map(str, args)], env=env, capture_output=True, text=True, timeout=240)
    if check: assert p.returncode == 0, p.stderr[-3000:]
    return p


def ends(folder, rank=0): return torch.load(Path(folder) / f"end-{rank}.pt", weights_only=True)

def assert_same(a, b):
    for module in a:
        for key in a[module]: assert torch.equal(a[module][key], b[module][key]), f"{module}.{key} differs"


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    "An uninterrupted run."
    folder = tmp_path_factory.mktemp("through")
    job(folder)
    return ends(folder)


@pytest.mark.parametrize("kill_at", [16, 176, 480, 944])
def test_sigkill_and_resume_is_bit_identical(tmp_path, through, kill_at):
    p = job(tmp_path, kill_at, check=False)
    assert p.returncode == -signal.SIGKILL
    job(tmp_path)
    assert_same(ends(tmp_path), through)
    seen = [r["seen"] for r in Run(dict(stage="job", profile="test"), tmp_path).read_log()]
    assert seen == sorted(set(seen)) and seen[-1] == 960


def test_killed_twice(tmp_path, through):
    for at in (200, 700): assert job(tmp_path, at, check=False).returncode == -signal.SIGKILL
    job(tmp_path)
    assert_same(ends(tmp_path), through)


def test_workers_and_accumulation_change_nothing_but_speed(tmp_path, through):
    job(tmp_path, JOB_WORKERS="2")
    assert_same(ends(tmp_path), through)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_means_checkpoint_and_try_again(tmp_path, through, name):
    p = job(tmp_path, 300, check=False, JOB_SIGNAL=str(int(getattr(signal, name))))
    assert p.returncode == 75
    assert last_checkpoint(Run(dict(stage="job", profile="test"), tmp_path)) is not None
    job(tmp_path)
    assert_same(ends(tmp_path), through)


def test_two_processes_resume_bit_identical_and_refuse_one(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    p = job(a, processes=2)
    assert "world size 2" in p.stdout
    assert job(b, 480, processes=2, check=False).returncode != 0
    assert last_checkpoint(Run(dict(stage="job", profile="test"), b)) is not None
    single = job(b, check=False)
    assert single.returncode != 0 and "was written by 2 process(es)" in single.stderr
    job(b, processes=2)
    for rank in (0, 1): assert_same(ends(a, rank), ends(b, rank))


def test_nan_loss_stops_and_keeps_the_last_good_state(tmp_path):
    p = job(tmp_path, "-", 320, check=False)
    assert p.returncode == 1 and "the loss is nan in the batch that ends at image" in p.stderr
    state = torch.load(last_checkpoint(Run(dict(stage="job", profile="test"), tmp_path)) / "state.pt", weights_only=True)
    assert state["at"]["seen"] == 320 and all(torch.isfinite(v).all() for v in state["modules"]["model"].values())


def test_half_written_checkpoint_is_ignored(tmp_path, through):
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    torn = tmp_path / "checkpoints" / "writing-seen-000000000912"
    torn.mkdir(); (torn / "state.pt").write_bytes(b"half")
    job(tmp_path)
    assert_same(ends(tmp_path), through)


def test_checkpoints_hold_no_code(tmp_path):
    job(tmp_path)
    for f in last_checkpoint(Run(dict(stage="job", profile="test"), tmp_path)).iterdir(): torch.load(f, weights_only=True)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


class Plan(Task):
    "Positions only: a curriculum over a set of 50 images."
    def __init__(self, batch, changes): self.recipe, self.changes = dict(batch_size=batch), changes
    def phase(self, seen): return sum(seen >= c for c in self.changes)
    def sampler(self, phase, n_pass, advance, rank, world_size):
        order = np.random.default_rng([n_pass, phase]).permutation(50); b = self.recipe["batch_size"]
        return (order[i:i + b] for i in range(b * advance, 50 - b + 1, b))


@pytest.mark.parametrize("batch,changes", [(4, ()), (5, (50,)), (7, (3, 4, 200)), (50, (50, 100)), (6, (0, 11, 150))])
def test_every_position_can_be_resumed(batch, changes):
    task = Plan(batch, changes)
    whole = list(batches(task, 300, Position()))
    assert [p.seen for p, _ in whole] == list(range(batch, 300 + batch, batch))
    for i in range(len(whole)):
        rest = list(batches(task, 300, whole[i][0]))
        assert len(rest) == len(whole) - i - 1
        assert all(p == q and (a == b).all() for (p, a), (q, b) in zip(rest, whole[i + 1:]))


def test_empty_pass_is_an_error_not_a_loop():
    with pytest.raises(ValueError, match="gives no batch"): list(batches(Plan(51, ()), 100, Position()))
    with pytest.raises(ValueError, match="empty"): budget(dict(epochs=1, images_per_epoch=None, batch_size=4), 0)

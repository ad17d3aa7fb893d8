"""Killed and resumed runs end bit for bit where uninterrupted ones do; NaN, signals, damaged checkpoints."""
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from job_runs import assert_same, ends, job, RUN, said
from trainings import Toy, toy

from cion_nb.core.runs import Run
from cion_nb.training import engine
from cion_nb.training.engine import batches, budget, last_checkpoint, Position, Preempted, Task


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("kill_at", [16, 176, 480, 944])
def test_sigkill_and_resume_is_bit_identical(tmp_path, through, kill_at):
    p = job(tmp_path, kill_at, check=False)
    assert p.returncode == -signal.SIGKILL
    job(tmp_path)
    assert_same(ends(tmp_path), through)
    seen = [r["seen"] for r in RUN(tmp_path).read_log()]
    assert seen == sorted(set(seen)) and seen[-1] == 960


@pytest.mark.slow("starts processes")
def test_killed_twice(tmp_path, through):
    "The second time on another CPU, as the checkpoint says: allowed, and told."
    for at in (200, 700): assert job(tmp_path, at, check=False).returncode == -signal.SIGKILL
    file = last_checkpoint(RUN(tmp_path)) / "state.pt"
    state = torch.load(file, weights_only=True)
    torch.save(state | dict(kernels=state["kernels"] | dict(limit="SSE41")), file)
    note, = said(job(tmp_path))["notes"]
    assert_same(ends(tmp_path), through)
    assert note.startswith("may not be bit-identical: checkpoint at image ") and "limit SSE41 (now " in note


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("name,group", [("SIGTERM", "1"), ("SIGUSR1", "")],
                         ids=["SIGTERM to every process", "SIGUSR1 to one"])
def test_signal_means_checkpoint_and_try_again(tmp_path, through, name, group):
    "Loader workers change nothing but the speed, and do not die of what a cluster sends to all processes."
    p = job(tmp_path, 300, check=False, start_new_session=True, JOB_SIGNAL=str(int(getattr(signal, name))),
            JOB_GROUP=group, JOB_RECIPE='{"workers": 2, "checkpoint_minutes": 60}')
    assert p.returncode == 75 and "the same command goes on from there" in p.stderr
    assert last_checkpoint(RUN(tmp_path)).name == "seen-000000000320", "the signal came after image 304, during a step"
    report = said(job(tmp_path))
    assert_same(ends(tmp_path), through)
    assert (report["resumed"], report["notes"], report["processes"], report["threads"]) == (1, [], 1, 1)


@pytest.mark.slow("starts processes")
def test_two_processes_resume_bit_identical_and_refuse_one_unless_told(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    report = said(job(a, processes=2, JOB_RECIPE='{"sync_bn": true}'))
    assert report["processes"] == 2
    assert report["notes"] == ["sync_bn needs CUDA: every process has its own BatchNorm statistics"]
    assert job(b, 480, processes=2, check=False).returncode != 0
    single = job(b, check=False)
    assert single.returncode != 0 and "written by processes 2 (now 1)" in single.stderr
    assert "CION_NB_RESUME=anyway" in single.stderr
    other = shutil.copytree(b, tmp_path / "other")
    job(b, processes=2)
    for rank in (0, 1): assert_same(ends(a, rank), ends(b, rank))
    assert not torch.equal(ends(a, 0)["teacher"]["1.running_mean"], ends(a, 1)["teacher"]["1.running_mean"]), (
        "each rank's teacher has seen its own images")
    told = job(other, CION_NB_RESUME="anyway")
    note, = said(told)["notes"]
    assert note.startswith("not bit-identical: checkpoint at image 4") and note in told.stderr
    assert said(told)["processes"] == 1


@pytest.mark.slow("starts processes")
def test_threads_are_set_back_on_resume_unless_told(tmp_path):
    assert job(tmp_path, 480, check=False, OMP_NUM_THREADS="2").returncode == -signal.SIGKILL
    other = shutil.copytree(tmp_path, tmp_path.with_name("told"))
    assert said(job(tmp_path))["threads"] == 2
    told = said(job(other, CION_NB_RESUME="anyway"))
    assert told["threads"] == 1 and "threads 2 (now 1)" in told["notes"][0]


def test_the_log_is_cut_in_one_step(tmp_path, monkeypatch):
    "A kill while rows after the checkpoint are taken out loses none of those before it."
    run = RUN(tmp_path)
    for seen in (16, 32, 48): run.log(seen=seen)
    def killed(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt): engine._trim_log(run, Position(seen=32))
    assert [r["seen"] for r in run.read_log()] == [16, 32, 48]
    engine._trim_log(run, Position(seen=32), ["told"])
    assert run.read_log() == [dict(seen=16), dict(seen=32), dict(seen=32, note="told")]
    engine._trim_log(run, Position())
    assert not run.read_log()


class Plan(Task):
    "Positions only: a curriculum over a set of 50 images."
    def __init__(self, batch, changes): self.recipe, self.changes = dict(batch_size=batch), changes
    def phase(self, seen): return sum(seen >= c for c in self.changes)
    def sampler(self, phase, n_pass, advance, rank, world_size):
        order = np.random.default_rng([n_pass, phase]).permutation(50)
        b = self.recipe["batch_size"]
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


def test_a_batch_larger_than_the_whole_budget_is_refused():
    plan = dict(epochs=2, images_per_epoch=96, batch_size=300)
    with pytest.raises(ValueError, match="batch_size=300 is more than the 192 presentations"): budget(plan, 1000)
    assert budget(plan | dict(batch_size=192), 1000) == 192 and budget(plan | dict(batch_size=100), 1000) == 200, (
        "whole batches, the nearest number of them")


def test_accumulated_gradients_are_the_whole_batchs(tmp_path):
    whole, _, _ = toy(tmp_path / "a")
    for n in (2, 4):
        parts, run, _ = toy(tmp_path / str(n), accumulate=n)
        assert [r["seen"] for r in run.read_log()] == list(range(12, 97, 12)), (
            "a step is `batch_size` images however it is cut")
        for p, q in zip(whole.modules["model"].parameters(), parts.modules["model"].parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must divide"): toy(tmp_path / "odd", accumulate=5)


def test_compiled_runs_share_checkpoints_with_plain_ones(tmp_path, monkeypatch):
    "Traced and differentiated by torch.compile, without the minute that its C++ takes."
    plain, _, _ = toy(tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(Toy, "after_step", lambda self, share: os.kill(os.getpid(), signal.SIGUSR1) if share == .5
                        else None)
    with pytest.raises(Preempted): toy(tmp_path / "cut", compile=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2, "model and teacher"
    monkeypatch.undo()
    state = torch.load(last_checkpoint(Run(dict(stage="toy", profile="test"), tmp_path / "cut")) / "state.pt",
                       weights_only=True)
    assert set(state["modules"]["model"]) == set(plain.modules["model"].state_dict())
    half, _, _ = toy(tmp_path / "cut")
    for p, q in zip(plain.modules["model"].parameters(), half.modules["model"].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_trackers_by_name(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, run, _ = toy(tmp_path, trackers=["tensorboard"])
    seen = EventAccumulator(str(run.folder / "trackers" / "cion_nb")).Reload().Scalars("loss")
    assert [(e.step, pytest.approx(e.value)) for e in seen] == [(r["seen"], r["loss"]) for r in run.read_log()]
    assert all(r["images_per_second"] > 0 for r in run.read_log())
    with pytest.raises(ValueError, match="tensorbord"): toy(tmp_path / "typo", trackers=["tensorbord"])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="pip install tensorboard"): toy(tmp_path / "absent", trackers=["tensorboard"])


def test_fp16_without_a_gpu_says_what_it_is_instead(tmp_path):
    if torch.cuda.is_available(): pytest.skip("this machine has a GPU")
    with pytest.warns(UserWarning, match="fp16 needs a GPU"): _, _, report = toy(tmp_path, precision="fp16")
    assert report["notes"] and report["precision"] in ("bf16", "no")


def test_the_last_k_checkpoints_stay(tmp_path, monkeypatch):
    "While a run goes on; when it is done its last one stays."
    kept, save = [], engine.save_checkpoint
    def spy(task, run, *args):
        save(task, run, *args)
        kept.append(sorted(int(p.name.removeprefix("seen-")) for p in (run.folder / "checkpoints").iterdir()))
    monkeypatch.setattr(engine, "save_checkpoint", spy)
    toy(tmp_path, checkpoint_minutes=0., keep_checkpoints=3)
    assert kept[-3:] == [[48, 60, 72], [60, 72, 84], [96]]


@pytest.mark.slow("starts processes")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="SyncBatchNorm and NCCL need two GPUs")
def test_two_gpus(tmp_path):
    report = said(job(tmp_path, processes=2, ACCELERATE_USE_CPU="false",
                      JOB_RECIPE='{"sync_bn": true, "precision": "fp16"}'))
    assert (report["processes"], report["device"], report["notes"]) == (2, "cuda", [])
    assert torch.equal(ends(tmp_path, 0)["teacher"]["1.running_mean"], ends(tmp_path, 1)["teacher"]["1.running_mean"])


@pytest.mark.slow("starts processes")
def test_channels_last_damages_no_memory():
    """oneDNN issue 6035: the gradient of FastViT's stem wrote past its buffer; without `to_channels_last` this process
    dies at its next allocation.
    """
    code = ("import torch; torch.set_num_threads(1)\n"
            "from cion_nb.models.backbones import create_backbone\nfrom cion_nb.training.engine import "
            "to_channels_last\n"
            "m = to_channels_last(create_backbone('fastvit_s12', (256, 128)).train())\n"
            "for _ in range(2): m(torch.randn(2, 3, 256, "
            "128).to(memory_format=torch.channels_last)).square().mean().backward()\n"
            "print(sum(float(p.grad.abs().sum()) for p in m.parameters() if p.grad is not None) > 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr[-500:]


def test_denormals_are_zero_in_training_and_only_there():
    from cion_nb.training.engine import _without_denormals
    tiny = torch.tensor(1e-40)
    assert float(tiny * 1) != 0
    with pytest.raises(KeyError):
        with _without_denormals(torch.device("cpu")):
            assert float(tiny * 1) == 0
            raise KeyError
    assert float(tiny * 1) != 0
    with _without_denormals(torch.device("cuda")): assert float(tiny * 1) != 0

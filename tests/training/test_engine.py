"""Killed and resumed runs end bit for bit where uninterrupted ones do; NaN, signals, damaged checkpoints."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cion_nb.core.runs import Run
from cion_nb.core.samples import make_samples
from cion_nb.training import engine
from cion_nb.training.engine import Position, Preempted, Task, adamw, batches, budget, fit, last_checkpoint, not_finite
from cion_nb.training.views import ImageStore

from jobs.training_job import Job
from places import JOBS

JOB = JOBS / "training_job.py"


def job(folder, *args, processes=1, check=True, start_new_session=False, **env):
    "Run the job in its own process(es); returns the finished process."
    launch = [sys.executable, str(JOB)] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(random.randint(20000, 40000)), str(JOB)]
    env = os.environ | dict(OMP_NUM_THREADS="1", CION_NB_PROGRESS="0", ACCELERATE_USE_CPU="true") | env
    p = subprocess.run([*launch, str(folder), *map(str, args)], env=env, capture_output=True, text=True, timeout=240, start_new_session=start_new_session)
    if check: assert p.returncode == 0, p.stderr[-3000:]
    return p


def said(p): return json.loads(p.stdout.splitlines()[-1])


def RUN(folder): return Run(dict(stage="job", profile="test"), folder)


def ends(folder, rank=0): return torch.load(Path(folder) / f"end-{rank}.pt", weights_only=True)


def assert_same(a, b):
    for module in a:
        for key in a[module]: assert torch.equal(a[module][key], b[module][key]), f"{module}.{key} differs"


@pytest.fixture(scope="module")
def through_folder(tmp_path_factory):
    "An uninterrupted run."
    folder = tmp_path_factory.mktemp("through")
    job(folder)
    return folder


@pytest.fixture(scope="module")
def through(through_folder): return ends(through_folder)


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
    file = last_checkpoint(RUN(tmp_path)) / "state.pt"; state = torch.load(file, weights_only=True)
    torch.save(state | dict(kernels=state["kernels"] | dict(limit="SSE41")), file)
    note, = said(job(tmp_path))["notes"]
    assert_same(ends(tmp_path), through)
    assert note.startswith("may not be bit-identical: checkpoint at image ") and "limit SSE41 (now " in note


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("name,group", [("SIGTERM", "1"), ("SIGUSR1", "")], ids=["SIGTERM to every process", "SIGUSR1 to one"])
def test_signal_means_checkpoint_and_try_again(tmp_path, through, name, group):
    "Loader workers change nothing but the speed, and do not die of what a cluster sends to all processes."
    p = job(tmp_path, 300, check=False, start_new_session=True, JOB_SIGNAL=str(int(getattr(signal, name))), JOB_GROUP=group, JOB_RECIPE='{"workers": 2, "checkpoint_minutes": 60}')
    assert p.returncode == 75 and "the same command goes on from there" in p.stderr
    assert last_checkpoint(RUN(tmp_path)).name == "seen-000000000320", "the signal came after image 304, during a step"
    report = said(job(tmp_path))
    assert_same(ends(tmp_path), through)
    assert (report["resumed"], report["notes"], report["processes"], report["threads"]) == (1, [], 1, 1)


@pytest.mark.slow("starts processes")
def test_two_processes_resume_bit_identical_and_refuse_one_unless_told(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    report = said(job(a, processes=2, JOB_RECIPE='{"sync_bn": true}'))
    assert report["processes"] == 2 and report["notes"] == ["sync_bn needs CUDA: every process has its own BatchNorm statistics"]
    assert job(b, 480, processes=2, check=False).returncode != 0
    single = job(b, check=False)
    assert single.returncode != 0 and "written by processes 2 (now 1)" in single.stderr and "CION_NB_RESUME=anyway" in single.stderr
    other = shutil.copytree(b, tmp_path / "other")
    job(b, processes=2)
    for rank in (0, 1): assert_same(ends(a, rank), ends(b, rank))
    assert not torch.equal(ends(a, 0)["teacher"]["1.running_mean"], ends(a, 1)["teacher"]["1.running_mean"]), "each rank's teacher has seen its own images"
    told = job(other, CION_NB_RESUME="anyway")
    note, = said(told)["notes"]
    assert note.startswith("not bit-identical: checkpoint at image 4") and note in told.stderr and said(told)["processes"] == 1


@pytest.mark.slow("starts processes")
def test_threads_are_set_back_on_resume_unless_told(tmp_path):
    assert job(tmp_path, 480, check=False, OMP_NUM_THREADS="2").returncode == -signal.SIGKILL
    other = shutil.copytree(tmp_path, tmp_path.with_name("told"))
    assert said(job(tmp_path))["threads"] == 2
    told = said(job(other, CION_NB_RESUME="anyway"))
    assert told["threads"] == 1 and "threads 2 (now 1)" in told["notes"][0]


@pytest.mark.parametrize("where,minutes,word", [("loss", 0., "the loss is nan in the batch that ends at image 336 "), ("weights", 0., "model.0.weight is not finite after the update in the batch that ends at image 336 "),
                                                ("weights", 60., "the loss is nan in the batch that ends at image 352 (pass 1, batch 10; model.0.weight is not finite since the batch before: ")])
def test_nan_stops_names_its_batch_and_keeps_the_last_good_state(tmp_path, monkeypatch, where, minutes, word):
    monkeypatch.setenv("JOB_NAN", where)
    task, run = Job(), RUN(tmp_path)
    task.nan_at, task.recipe = 320, Job.recipe | dict(checkpoint_minutes=minutes)
    with pytest.raises(FloatingPointError) as said: fit(task, run)
    assert word in str(said.value)
    last = last_checkpoint(run)
    assert last is None if minutes else last.name == "seen-000000000320"
    assert ("no checkpoint was written before it" if minutes else f"the last good checkpoint stays: {last}") in str(said.value)
    rows = next(rows for at, rows in batches(Job(), 960, Position()) if at.seen == 336)
    assert json.loads((tmp_path / "broken.json").read_text())["ranks"][0]["images"] == [str(r) for r in rows], "the batch that did it, in every case"
    if last: assert all(torch.isfinite(v).all() for v in torch.load(last / "state.pt", weights_only=True)["modules"]["model"].values())


def test_an_infinite_moment_is_found():
    "Adam divides by it, so that the parameter never moves again, and no loss tells."
    model = nn.Sequential(nn.Linear(2, 2)); optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters(): p.grad = torch.ones_like(p)
    model[0].bias.grad[0] = 1e30; optimizer.step()
    assert not_finite(dict(model=model)) is None and not_finite(dict(model=model), optimizer) == "model.0.bias (exp_avg_sq of the optimizer)"
    model[0].weight.data[0, 0] = float("nan")
    assert not_finite(dict(model=model), optimizer) == "model.0.weight"


def test_the_log_is_cut_in_one_step(tmp_path, monkeypatch):
    "A kill while rows after the checkpoint are taken out loses none of those before it."
    run = RUN(tmp_path)
    for seen in (16, 32, 48): run.log(seen=seen)
    def killed(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt): engine._trim_log(run, Position(seen=32))
    assert [r["seen"] for r in run.read_log()] == [16, 32, 48]
    engine._trim_log(run, Position(seen=32), ["told"]); assert run.read_log() == [dict(seen=16), dict(seen=32), dict(seen=32, note="told")]
    engine._trim_log(run, Position()); assert not run.read_log()


@pytest.mark.slow("starts processes")
def test_nan_on_one_rank_stops_all(tmp_path):
    p = job(tmp_path, "-", 320, processes=2, check=False, JOB_NAN_RANK="1")
    assert p.returncode == 1 and p.stderr.count("FloatingPointError: job-test") == 2, "both ranks say so, and none waits for the other"
    broken = json.loads((tmp_path / "broken.json").read_text())
    assert [r["rank"] for r in broken["ranks"]] == [1] and len(broken["ranks"][0]["images"]) == 8
    assert last_checkpoint(RUN(tmp_path)).name == "seen-000000000320"


@pytest.mark.slow("starts processes")
def test_half_written_checkpoint_is_ignored(tmp_path, through):
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    torn = tmp_path / "checkpoints" / "writing-seen-000000000912"
    torn.mkdir(); (torn / "state.pt").write_bytes(b"half")
    job(tmp_path)
    assert_same(ends(tmp_path), through)


def bad_disk(path, how):
    "What can happen to a file between two starts."
    data = bytearray(path.read_bytes())
    if how == "flipped": data[len(data) // 3] ^= 0x10                     # one bit, which loads without complaint
    path.write_bytes(data[:len(data) // 2] if how == "cut" else b"" if how == "empty" else data)
    if how == "gone": path.unlink()


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("how,file", [("cut", "state.pt"), ("flipped", "state.pt"), ("gone", "state.pt"), ("empty", "rank-0.pt"), ("flipped", "rank-0.pt")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, through, how, file):
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    newest = last_checkpoint(RUN(tmp_path))
    bad_disk(newest / file, how)
    report = said(job(tmp_path))
    assert_same(ends(tmp_path), through)
    assert report["resumed"] == 1 and f"damaged-{newest.name} is damaged ({file}" in report["notes"][0] and not newest.with_name("damaged-" + newest.name).match("seen-*")


@pytest.mark.slow("starts processes")
def test_where_every_checkpoint_is_damaged_the_run_starts_anew(tmp_path, through):
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    for folder in (tmp_path / "checkpoints").glob("seen-*"): bad_disk(folder / "state.pt", "cut")
    report = said(job(tmp_path))
    assert_same(ends(tmp_path), through)
    assert report["resumed"] == 0 and len(report["notes"]) == 2


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("how,word", [("empty", "KeyError"), ("tensor", "no checkpoint of this run"), ("code", "UnpicklingError"), ("key", "Missing key"), ("far", "1,000,000,000 images were seen, and the run has 960"), ("rank", "rank-0.pt is missing")])
def test_a_foreign_checkpoint_is_named(tmp_path, how, word):
    "Whole files, but not ours: said, and nothing is changed."
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    folder = last_checkpoint(RUN(tmp_path)); state = torch.load(folder / "state.pt", weights_only=True)
    if how == "key": del state["modules"]["model"]["0.weight"]
    if how == "far": state["at"]["seen"] = 10**9
    torch.save(dict(empty={}, tensor=torch.zeros(3), code=JOB).get(how, state), folder / "state.pt")
    if how == "rank": (folder / "rank-0.pt").unlink()
    with pytest.raises(ValueError, match=word) as said: fit(Job(), RUN(tmp_path))
    assert folder.name in str(said.value) and "move " in str(said.value)


@pytest.mark.slow("starts processes")
def test_a_copy_beside_the_checkpoints_is_left_alone(tmp_path, through):
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    copy = tmp_path / "checkpoints" / "seen-my-copy"; shutil.copytree(last_checkpoint(RUN(tmp_path)), copy)
    job(tmp_path); assert_same(ends(tmp_path), through); assert (copy / "state.pt").exists()
    with pytest.raises(ValueError, match="at least one checkpoint"): fit(Job(), RUN(tmp_path / "x"), keep=-1)


@pytest.mark.slow("starts processes")
def test_checkpoints_hold_no_code(through_folder):
    for f in last_checkpoint(RUN(through_folder)).iterdir(): torch.load(f, weights_only=True)
    assert len(list((through_folder / "checkpoints").iterdir())) == 2


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


def test_a_batch_larger_than_the_whole_budget_is_refused():
    plan = dict(epochs=2, images_per_epoch=96, batch_size=300)
    with pytest.raises(ValueError, match="batch_size=300 is more than the 192 presentations"): budget(plan, 1000)
    assert budget(plan | dict(batch_size=192), 1000) == 192 and budget(plan | dict(batch_size=100), 1000) == 200, "whole batches, the nearest number of them"


class Toy(Task):
    "Fitted in this process: a linear map of 60 points, optionally from images on disk."
    n_images, kept = 60, None
    def __init__(self, **changes): self.recipe = dict(epochs=2, images_per_epoch=48, batch_size=12, workers=0, precision="fp32", seed=0, checkpoint_minutes=60) | changes
    def build(self, device):
        self.modules = dict(model=nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1)).to(device))
        self.modules["teacher"] = deepcopy(self.modules["model"]).requires_grad_(False)
        self.optimizer = adamw(self.modules["model"].parameters(), 1e-2)
    def sampler(self, phase, n_pass, advance, rank, world_size):
        size = self.recipe["batch_size"] // self.recipe.get("accumulate", 1)
        order = np.random.default_rng(n_pass).permutation(60)
        for i in range(advance * size, 60, size): yield order[i:i + size]
    def load(self, rows, seen):
        if self.images is not None: return torch.stack([i.float().mean((1, 2)) for i in self.images[rows]]) / 255
        return torch.randn(60, 3, generator=torch.Generator().manual_seed(0))[rows]
    def loss(self, model, batch, accelerator):
        with torch.no_grad(): target = self.modules["teacher"](batch)
        return (model(batch) - batch.sum(1, keepdim=True) - 0 * target).square().mean(), dict(mean=batch.mean())


def toy(folder, **changes):
    task = Toy(**changes); run = Run(dict(stage="toy", profile="test"), folder)
    return task, run, fit(task, run, log_every=1)


def test_accumulated_gradients_are_the_whole_batchs(tmp_path):
    whole, _, _ = toy(tmp_path / "a")
    for n in (2, 4):
        parts, run, _ = toy(tmp_path / str(n), accumulate=n)
        assert [r["seen"] for r in run.read_log()] == list(range(12, 97, 12)), "a step is `batch_size` images however it is cut"
        for p, q in zip(whole.modules["model"].parameters(), parts.modules["model"].parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must divide"): toy(tmp_path / "odd", accumulate=5)


def test_compiled_runs_share_checkpoints_with_plain_ones(tmp_path, monkeypatch):
    "Traced and differentiated by torch.compile, without the minute that its C++ takes."
    plain, _, _ = toy(tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(Toy, "after_step", lambda self, share: os.kill(os.getpid(), signal.SIGUSR1) if share == .5 else None)
    with pytest.raises(Preempted): toy(tmp_path / "cut", compile=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2, "model and teacher"
    monkeypatch.undo()
    state = torch.load(last_checkpoint(Run(dict(stage="toy", profile="test"), tmp_path / "cut")) / "state.pt", weights_only=True)
    assert set(state["modules"]["model"]) == set(plain.modules["model"].state_dict())
    half, _, _ = toy(tmp_path / "cut")
    for p, q in zip(plain.modules["model"].parameters(), half.modules["model"].parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


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


def test_the_last_k_checkpoints_stay(tmp_path):
    _, run, _ = toy(tmp_path, checkpoint_minutes=0., keep_checkpoints=3)
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == [f"seen-{n:012d}" for n in (72, 84, 96)]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_wherever_they_are_met(tmp_path, monkeypatch, workers):
    "Too many images for memory are read in the workers, which take what they know with them; a resumed run knows it still."
    for i in range(60): Image.fromarray(np.full((8, 4, 3), 4 * i, np.uint8)).save(tmp_path / f"{i}.png")
    for i in (3, 7): (tmp_path / f"{i}.png").write_bytes(b"no image")
    table = make_samples(path=[f"{i}.png" for i in range(60)], pid=[i // 4 for i in range(60)])
    monkeypatch.setattr(Toy, "samples", table); monkeypatch.setattr(Toy, "images", ImageStore(table, tmp_path, memory=0, threads=1))
    assert not Toy.images.in_memory
    monkeypatch.setattr(Toy, "after_step", lambda self, share: os.kill(os.getpid(), signal.SIGUSR1) if share == .5 else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Toy.images.reasons.clear()
        with pytest.raises(Preempted): toy(tmp_path / "run", workers=workers)
        monkeypatch.setattr(Toy, "after_step", Task.after_step)
        Toy.images.reasons.clear()
        _, run, report = toy(tmp_path / "run", workers=workers)
    listed = json.loads((run.folder / "unreadable.json").read_text())
    assert report["unreadable"] == 2 and set(listed) == {"3.png", "7.png"} and all(listed.values())


def test_a_node_that_does_not_see_the_runs_is_named(tmp_path):
    from types import SimpleNamespace

    from cion_nb.training.engine import _agreed_checkpoint
    other = SimpleNamespace(is_main_process=False, num_processes=1, process_index=3)
    with pytest.raises(FileNotFoundError, match="process 3 on .* need one file system"): _agreed_checkpoint(Run(dict(stage="toy", profile="test"), tmp_path / "elsewhere"), other)


@pytest.mark.slow("starts processes")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="SyncBatchNorm and NCCL need two GPUs")
def test_two_gpus(tmp_path):
    report = said(job(tmp_path, processes=2, ACCELERATE_USE_CPU="false", JOB_RECIPE='{"sync_bn": true, "precision": "fp16"}'))
    assert (report["processes"], report["device"], report["notes"]) == (2, "cuda", [])
    assert torch.equal(ends(tmp_path, 0)["teacher"]["1.running_mean"], ends(tmp_path, 1)["teacher"]["1.running_mean"])


@pytest.mark.slow("starts processes")
def test_channels_last_damages_no_memory():
    "oneDNN issue 6035: the gradient of FastViT's stem wrote past its buffer; without `to_channels_last` this process dies at its next allocation."
    code = ("import torch; torch.set_num_threads(1)\n"
            "from cion_nb.models.backbones import create_backbone\nfrom cion_nb.training.engine import to_channels_last\n"
            "m = to_channels_last(create_backbone('fastvit_s12', (256, 128)).train())\n"
            "for _ in range(2): m(torch.randn(2, 3, 256, 128).to(memory_format=torch.channels_last)).square().mean().backward()\n"
            "print(sum(float(p.grad.abs().sum()) for p in m.parameters() if p.grad is not None) > 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr[-500:]


def test_denormals_are_zero_in_training_and_only_there():
    from cion_nb.training.engine import _without_denormals
    tiny = torch.tensor(1e-40)
    assert float(tiny * 1) != 0
    with pytest.raises(KeyError):
        with _without_denormals(torch.device("cpu")): assert float(tiny * 1) == 0; raise KeyError
    assert float(tiny * 1) != 0
    with _without_denormals(torch.device("cuda")): assert float(tiny * 1) != 0

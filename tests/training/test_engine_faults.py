"""What goes wrong in a run: NaN stops it with its batch named, damaged and foreign checkpoints, unreadable images, a
folder that is not seen."""
import json
import os
import shutil
import signal
import warnings

import numpy as np
import pytest
import torch
from job_runs import assert_same, ends, JOB, job, RUN, said
from jobs.training_job import Job
from PIL import Image
from torch import nn
from trainings import Toy, toy

from cion_nb.core.runs import Run
from cion_nb.core.samples import make_samples
from cion_nb.training.engine import batches, fit, last_checkpoint, not_finite, Position, Preempted, Task
from cion_nb.training.views import ImageStore


@pytest.mark.parametrize("where,minutes,word", [("loss", 0., "the loss is nan in the batch that ends at image 336 "),
                                                ("weights", 0.,
                                                 "model.0.weight is not finite after the update in the batch that ends "
                                                 "at image 336 "),
                                                ("weights", 60.,
                                                 "the loss is nan in the batch that ends at image 352 (pass 1, batch "
                                                 "10; model.0.weight is not finite since the batch before: ")])
def test_nan_stops_names_its_batch_and_keeps_the_last_good_state(tmp_path, monkeypatch, where, minutes, word):
    monkeypatch.setenv("JOB_NAN", where)
    task, run = Job(), RUN(tmp_path)
    task.nan_at, task.recipe = 320, Job.recipe | dict(checkpoint_minutes=minutes)
    with pytest.raises(FloatingPointError) as said: fit(task, run)
    assert word in str(said.value)
    last = last_checkpoint(run)
    assert last is None if minutes else last.name == "seen-000000000320"
    assert ("no checkpoint was written before it" if minutes else f"the last good checkpoint stays: {last}") in str(
        said.value)
    rows = next(rows for at, rows in batches(Job(), 960, Position()) if at.seen == 336)
    assert json.loads((tmp_path / "broken.json").read_text())["ranks"][0]["images"] == [str(r) for r in rows], (
        "the batch that did it, in every case")
    if last:
        assert all(torch.isfinite(v).all()
                   for v in torch.load(last / "state.pt", weights_only=True)["modules"]["model"].values())


def test_an_infinite_moment_is_found():
    "Adam divides by it, so that the parameter never moves again, and no loss tells."
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters(): p.grad = torch.ones_like(p)
    model[0].bias.grad[0] = 1e30
    optimizer.step()
    assert not_finite(dict(model=model)) is None
    assert not_finite(dict(model=model), optimizer) == "model.0.bias (exp_avg_sq of the optimizer)"
    model[0].weight.data[0, 0] = float("nan")
    assert not_finite(dict(model=model), optimizer) == "model.0.weight"


@pytest.mark.slow("starts processes")
def test_nan_on_one_rank_stops_all(tmp_path):
    p = job(tmp_path, "-", 320, processes=2, check=False, JOB_NAN_RANK="1")
    assert p.returncode == 1 and p.stderr.count("FloatingPointError: job-test") == 2, (
        "both ranks say so, and none waits for the other")
    broken = json.loads((tmp_path / "broken.json").read_text())
    assert [r["rank"] for r in broken["ranks"]] == [1] and len(broken["ranks"][0]["images"]) == 8
    assert last_checkpoint(RUN(tmp_path)).name == "seen-000000000320"


@pytest.mark.slow("starts processes")
def test_half_written_checkpoint_is_ignored(tmp_path, through):
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    torn = tmp_path / "checkpoints" / "writing-seen-000000000912"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half")
    job(tmp_path)
    assert_same(ends(tmp_path), through)


def bad_disk(path, how):
    "What can happen to a file between two starts."
    data = bytearray(path.read_bytes())
    if how == "flipped": data[len(data) // 3] ^= 0x10                     # one bit, which loads without complaint
    path.write_bytes(data[:len(data) // 2] if how == "cut" else b"" if how == "empty" else data)
    if how == "gone": path.unlink()


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("how,file",
                         [("cut", "state.pt"), ("flipped", "state.pt"), ("gone", "state.pt"), ("empty", "rank-0.pt"),
                          ("flipped", "rank-0.pt")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, through, how, file):
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    newest = last_checkpoint(RUN(tmp_path))
    bad_disk(newest / file, how)
    report = said(job(tmp_path))
    assert_same(ends(tmp_path), through)
    assert report["resumed"] == 1 and f"damaged-{newest.name} is damaged ({file}" in report["notes"][0]
    assert not newest.with_name("damaged-" + newest.name).match("seen-*")


@pytest.mark.slow("starts processes")
def test_where_every_checkpoint_is_damaged_the_run_starts_anew(tmp_path, through):
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    for folder in (tmp_path / "checkpoints").glob("seen-*"): bad_disk(folder / "state.pt", "cut")
    report = said(job(tmp_path))
    assert_same(ends(tmp_path), through)
    assert report["resumed"] == 0 and len(report["notes"]) == 2


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("how,word", [("empty", "KeyError"), ("tensor", "no checkpoint of this run"),
                                      ("code", "UnpicklingError"), ("key", "Missing key"),
                                      ("far", "1,000,000,000 images were seen, and the run has 960"),
                                      ("rank", "rank-0.pt is missing")])
def test_a_foreign_checkpoint_is_named(tmp_path, how, word):
    "Whole files, but not ours: said, and nothing is changed."
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    folder = last_checkpoint(RUN(tmp_path))
    state = torch.load(folder / "state.pt", weights_only=True)
    if how == "key": del state["modules"]["model"]["0.weight"]
    if how == "far": state["at"]["seen"] = 10**9
    torch.save(dict(empty={}, tensor=torch.zeros(3), code=JOB).get(how, state), folder / "state.pt")
    if how == "rank": (folder / "rank-0.pt").unlink()
    with pytest.raises(ValueError, match=word) as said: fit(Job(), RUN(tmp_path))
    assert folder.name in str(said.value) and "move " in str(said.value)


@pytest.mark.slow("starts processes")
def test_a_copy_beside_the_checkpoints_is_left_alone(tmp_path, through):
    assert job(tmp_path, 300, check=False).returncode == -signal.SIGKILL
    copy = tmp_path / "checkpoints" / "seen-my-copy"
    shutil.copytree(last_checkpoint(RUN(tmp_path)), copy)
    job(tmp_path)
    assert_same(ends(tmp_path), through)
    assert (copy / "state.pt").exists()
    with pytest.raises(ValueError, match="at least one checkpoint"): fit(Job(), RUN(tmp_path / "x"), keep=-1)


@pytest.mark.slow("starts processes")
def test_checkpoints_hold_no_code(through_folder):
    for f in last_checkpoint(RUN(through_folder)).iterdir(): torch.load(f, weights_only=True)
    assert len(list((through_folder / "checkpoints").iterdir())) == 1, "a finished run needs no older one"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_wherever_they_are_met(tmp_path, monkeypatch, workers):
    """Too many images for memory are read in the workers, which take what they know with them; a resumed run knows it
    still.
    """
    for i in range(60): Image.fromarray(np.full((8, 4, 3), 4 * i, np.uint8)).save(tmp_path / f"{i}.png")
    for i in (3, 7): (tmp_path / f"{i}.png").write_bytes(b"no image")
    table = make_samples(path=[f"{i}.png" for i in range(60)], pid=[i // 4 for i in range(60)])
    monkeypatch.setattr(Toy, "samples", table)
    monkeypatch.setattr(Toy, "images", ImageStore(table, tmp_path, memory=0, threads=1))
    assert not Toy.images.in_memory
    monkeypatch.setattr(Toy, "after_step", lambda self, share: os.kill(os.getpid(), signal.SIGUSR1) if share == .5
                        else None)
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
    with pytest.raises(FileNotFoundError, match="process 3 on .* need one file system"):
        _agreed_checkpoint(Run(dict(stage="toy", profile="test"), tmp_path / "elsewhere"), other)

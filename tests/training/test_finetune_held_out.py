"""People held out of training: who they are, their score by hand, the best checkpoint they choose."""
import json
import os
import signal
import subprocess
import sys
import time

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from trainings import quick

from cion_nb.core.runs import Run
from cion_nb.models.features import embed
from cion_nb.training.finetune import BestSoFar, finetune, FineTuning, held_out_score, load_finetuned

# Chosen by held-out people

@pytest.mark.slow("trains networks")
def test_held_out_people_choose_and_are_not_trained_on(people, runs):
    r = quick(people, held_out=.25, epochs=10)
    task = FineTuning(r)
    out = set(task.samples.pid.iloc[task.held_out])
    assert len(out) == 2 and task.n_ids == 6
    used = {int(i) for rows in task.sampler(None, 0, 0, 0, 1) for i in rows}
    assert not used & set(task.held_out.tolist()) and not (task.labels[task.held_out] >= 0).any()
    run = finetune(r)
    assert 0 < run.result["held_out_mAP"] <= 1 and 1 <= run.result["chosen_epoch"] <= 10
    assert run.result["held_out_images"] == 16 and run.result["train_images"] == 48
    model = load_finetuned(run.folder)
    t = task.samples.iloc[task.held_out]
    x = embed(model, [people.parent / p for p in t.path])
    assert held_out_score(x, t) == pytest.approx(run.result["held_out_mAP"], abs=.02), (
        "the saved model is the chosen one")


def test_held_out_score_by_hand():
    x = np.array([[1, 0], [1, .1], [0, 1], [.1, 1]], np.float32)
    t = pd.DataFrame(dict(pid=[1, 1, 2, 2], camid=[1, 2, 1, 2], path=list("abcd")))
    assert held_out_score(x, t) == 1. and held_out_score(x, t.assign(camid=-1)) == 1.
    # of a: b, d, then c
    assert held_out_score(x, t.assign(pid=[1, 2, 1, 2], camid=-1)) == pytest.approx(
        np.mean([1 / 3, 1 / 2, 1 / 3, 1 / 2]))
    with pytest.raises(ValueError): held_out_score(x, t.assign(pid=[1, 2, 3, 4]))


def score_plainly(x, t):
    "Every image asks all others; its own camera's images of the person do not count, as far as cameras are known."
    x, AP = x / np.linalg.norm(x, axis=1, keepdims=True), []
    for i in range(len(x)):
        kept = [j for j in range(len(x)) if j != i and not (t.pid[i] == t.pid[j] and t.camid[i] == t.camid[j] >= 0)]
        ranked = sorted(kept, key=lambda j: (-float(x[i] @ x[j]), j))
        right = [n for n, j in enumerate(ranked, 1) if t.pid[j] == t.pid[i]]
        if right: AP.append(np.mean([(k + 1) / n for k, n in enumerate(right)]))
    return np.mean(AP)


@pytest.mark.parametrize("unknown", [0, .3, .8, 1.])
def test_held_out_images_never_find_themselves(unknown):
    rng = np.random.default_rng(3)
    pid = np.repeat(np.arange(12), 4)
    n = len(pid)
    x = (rng.normal(size=(12, 8))[pid] + 1.5 * rng.normal(size=(n, 8))).astype(np.float32)
    t = pd.DataFrame(dict(path="same.png", pid=pid, camid=np.where(rng.random(n) < unknown, -1, rng.integers(0, 3, n))))
    assert held_out_score(x, t) == held_out_score(x, t.drop(columns="path")) == pytest.approx(
        score_plainly(x, t), abs=1e-6)


def test_best_so_far_keeps_the_best():
    model = nn.Linear(2, 2)
    best = BestSoFar(model)
    for score, epoch in ((.3, 1.), (.2, 2.), (.5, 3.), (.5, 4.)):
        with torch.no_grad(): model.weight.fill_(epoch)
        best.offer(model, score, epoch)
    assert (float(best.score), float(best.epoch), float(best.model.weight[0, 0])) == (.5, 3., 3.), "the first of equals"


@pytest.mark.slow("starts processes")
def test_killed_fine_tuning_with_held_out_people_resumes_to_the_same_bits(people, runs, tmp_path):
    r = quick(people, held_out=.25, epochs=10, checkpoint_minutes=0.)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(r))
    env = os.environ | dict(CION_NB_RUNS=str(tmp_path / "other"), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "cion_nb", "finetune", "--recipe", str(file)]
    p = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder, deadline = tmp_path / "other" / Run(r).name, time.time() + 120
    def seen(): return max((int(f.name[5:]) for f in (folder / "checkpoints").glob("seen-*")), default=0)
    # two epochs of ten: the warm-up is over
    while seen() < 64 and p.poll() is None and time.time() < deadline: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (folder / "result.json").exists()
    for where in (tmp_path / "other", tmp_path / "third"):
        if where == tmp_path / "third": done = forked.run(command[1:], env=env | dict(CION_NB_RUNS=str(where)))
        else: done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = (json.loads((tmp_path / w / Run(r).name / "result.json").read_text()) for w in ("other", "third"))
    assert a["resumed"] == 1 and b["resumed"] == 0
    assert all(a[k] == b[k] for k in ("held_out_mAP", "chosen_epoch", "mAP", "loss"))
    assert (folder / "backbone.safetensors").read_bytes() == (
        tmp_path / "third" / Run(r).name / "backbone.safetensors").read_bytes()

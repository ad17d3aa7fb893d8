"""Alarms of pre-training: quiet in health, ringing on collapse, alive after a kill."""
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from trainings import asked

from cion_nb.core.settings import recipe
from cion_nb.models.backbones import create_backbone
from cion_nb.training import pretrain as pretrain_room
from cion_nb.training.distill import CollapseWatch
from cion_nb.training.engine import _trim_log, Position
from cion_nb.training.pretrain import pretrain, WatchedRun

# 30 steps, 3 log rows
SHORT = dict(epochs=10, images_per_epoch=24, batch_size=8, n_id=[2], n_id_epochs=[0], warmup_epochs=0)


@pytest.mark.slow("trains networks")
def test_a_healthy_run_rings_no_alarm(people, runs):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run = pretrain(asked(people, **SHORT))
    log = pd.DataFrame(run.read_log())
    assert run.result["alarms"] == {} and log.alarms.tolist() == [[]] * 3
    assert (log.kl_to_uniform > .5).all() and (log.kl_to_mean > .5).all() and (log.centre_share < .9).all()
    assert (log[["feature_rank", "student_rank"]] > 2).all(axis=None)


@pytest.mark.slow("trains networks")
# sharpening without centring
@pytest.mark.parametrize("changes, rings, silent", [
    # centring without sharpening
    (dict(teacher_temp=10.), {"uniform", "constant"}, {"rank", "student_rank", "centre"}),
    (dict(centre_momentum=1., ema=[0., 0.], lr=.1, lr_per=8, head_bn=False), {"constant"}, {"uniform", "centre"})])
def test_a_collapse_of_the_outputs_rings(people, runs, changes, rings, silent):
    with pytest.warns(RuntimeWarning, match="alarm 'constant' at image 240: kl_to_mean"):
        run = pretrain(asked(people, **SHORT, **changes))
    assert rings <= run.result["alarms"].keys() and not silent & run.result["alarms"].keys()
    assert set(run.result["alarms"].values()) == {240} and rings <= set(run.read_log()[-1]["alarms"])


@pytest.mark.slow("trains networks")
def test_a_dead_camera_rings_centre_and_ranks(people, runs, tmp_path):
    root = Path(shutil.copytree(people.parent, tmp_path / "dead"))
    for f in root.glob("*.png"): Image.fromarray(np.full((64, 32, 3), 90, np.uint8)).save(f)
    with pytest.warns(RuntimeWarning, match="alarm 'centre'"):
        run = pretrain(asked(root / "samples.parquet", **SHORT, centre_momentum=.1,
                             view_changes=dict(jitter=0., solarise=[0., 0., 0.])))
    assert run.result["alarms"].keys() == {"constant", "centre", "rank", "student_rank"}


@pytest.mark.slow("trains networks")
def test_features_on_a_line_ring(people, runs, monkeypatch):
    class Line(torch.nn.Module):
        "A backbone whose features are multiples of one vector, beside a constant."
        def __init__(self, *args):
            super().__init__()
            self.inner = create_backbone(*args)
            self.input, self.embed_dim = self.inner.input, self.inner.embed_dim
        def forward(self, x): return self.inner(x)[:, :1] * torch.linspace(-1, 1, self.embed_dim) + 1
    monkeypatch.setattr(pretrain_room, "create_backbone", Line)
    monkeypatch.setattr(pretrain_room, "save_backbone", lambda *a, **k: None)
    with pytest.warns(RuntimeWarning, match="lie on a line"): run = pretrain(asked(people, **SHORT))
    assert {"rank", "student_rank"} <= run.result["alarms"].keys()


@pytest.mark.slow("trains networks")
def test_alarms_survive_a_kill(runs):
    run = WatchedRun(recipe("pretrain", "tiny", method="tracklet"), runs / "a")
    run.watch = CollapseWatch()
    for seen in range(10, 60, 10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.log(seen=seen, feature_rank=1.)
    again = WatchedRun(run.recipe, runs / "a")
    again.watch = CollapseWatch()
    with pytest.warns(RuntimeWarning, match="'rank' at image 30"): _trim_log(again, Position(40))
    assert again.watch.rang == run.watch.rang == dict(rank=30)
    assert [r["seen"] for r in again.read_log()] == [10, 20, 30, 40]

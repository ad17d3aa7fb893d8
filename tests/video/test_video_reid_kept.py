"""Frames that denoising discards are in neither training nor test; a trained mean takes single frames."""
import numpy as np
import pytest
import torch

from cion_nb.core.samples import make_samples
from cion_nb.core.settings import recipe
from cion_nb.data.datasets import read_data
from cion_nb.models.backbones import create_backbone
from cion_nb.training.finetune import BNNeck
from cion_nb.video import video_reid as V
from cion_nb.video.clips import FrameByFrame, TemporalMean
from cion_nb.video.denseil import DenseIL


def test_discarded_frames_go_and_no_tracklet_goes_with_them(monkeypatch):
    samples = make_samples([f"{i}.jpg" for i in range(7)], pid=[0, 0, 0, 1, 1, 2, 2], tracklet=[4, 4, 4, 5, 5, 9, 9],
                           frame=[0, 1, 2, 0, 1, 0, 1])
    labels = np.array([0, -1, 0, -1, -1, -1, 1])            # of tracklet 5 nothing would be left
    monkeypatch.setattr(V, "identity_labels", lambda table, kept: labels)
    left = V.kept_frames(samples, dict(stage="denoise"))
    assert left["path"].tolist() == ["0.jpg", "2.jpg", "3.jpg", "4.jpg", "6.jpg"]
    assert left.index.tolist() == list(range(5))


def test_kept_changes_the_name_of_a_run_and_its_absence_does_not():
    from cion_nb.core.runs import dependencies, Run
    plain = recipe("video_reid", "smoke", method="mean")
    assert Run(plain).name == Run({k: v for k, v in plain.items() if k != "kept"}).name
    denoised = recipe("denoise", "smoke", features=recipe("extract", "smoke", subset="clips"))
    other = recipe("video_reid", "smoke", method="mean", kept=denoised)
    assert Run(other).name != Run(plain).name and denoised in dependencies(other)


@pytest.mark.parametrize("split", ["train", "test"])
def test_both_splits_are_read_without_them(monkeypatch, split):
    samples = make_samples(["a.jpg", "b.jpg"], pid=[0, 0], tracklet=[1, 1], frame=[0, 1])
    monkeypatch.setattr(V, "read_data", lambda r, subset: (samples, subset))
    monkeypatch.setattr(V, "identity_labels", lambda table, kept: np.array([0, -1]))
    asked = recipe("video_reid", "smoke")
    assert len(V._clips_of(asked, split)[0]) == 2
    left, subset = V._clips_of(asked | dict(kept=dict(stage="denoise")), split)
    assert left["path"].tolist() == ["a.jpg"] and subset == f"clips_{split}"


def test_a_trained_mean_takes_frames_one_by_one():
    torch.manual_seed(0)
    encoder = create_backbone("resnet10_tiny_ibn", (64, 32))
    model = BNNeck(TemporalMean(encoder, 4), 3, "after_neck", "after_neck").eval()
    model.neck.running_mean.normal_()
    single, x = FrameByFrame(model).eval(), torch.randn(2, 4, 3, 64, 32)
    assert single.input.frames == 0 and single.embed_dim == model.embed_dim
    with torch.no_grad():
        frames = single(x.flatten(0, 1)).unflatten(0, (2, 4))
        torch.testing.assert_close(frames.mean(1), model(x), atol=1e-5, rtol=1e-5)
    decoder = BNNeck(DenseIL(encoder, T=4, P=4, d=16, blocks=1, heads=2), 3, "after_neck", "after_neck")
    with pytest.raises(ValueError, match="clips of 4 frames, and no single images"): FrameByFrame(decoder)


def test_the_clips_of_all_splits_are_one_subset(monkeypatch, tmp_path):
    from cion_nb.core.samples import write_samples
    table = make_samples(["a", "b", "c"], pid=[1, 1, 1], tracklet=[0, 1, 2], split=["train", "query", "gallery"])
    write_samples(table, tmp_path / "t.parquet")
    assert len(read_data(dict(data=str(tmp_path / "t.parquet")), "clips")[0]) == 3
    assert len(read_data(dict(data=str(tmp_path / "t.parquet")), "clips_test")[0]) == 2

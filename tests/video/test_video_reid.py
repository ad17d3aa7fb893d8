"""The stage of clips: two steps, what is frozen, what the triplets read, scores by tracklet, models that come back."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cion_nb.companion.score import load_model
from cion_nb.core.runs import Run
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.core.store import Features
from cion_nb.models.backbones import load_backbone
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.retrieval.protocols import sides
from cion_nb.training.engine import fit
from cion_nb.video.clips import extract_clips
from cion_nb.video.video_reid import load_clip_model, make_clip_model, METHODS, video_lr, video_reid, VideoFineTuning

QUICK = dict(epochs=2, images_per_epoch=32, batch_size=8, k=2, frames=3, width=32, heads=4, blocks=1, warmup_epochs=0,
             drops=[1.], precision="fp32", channels_last=False)


def quick(walkers, **changes):
    return recipe("video_reid", "tiny", **dict(data=str(walkers)) | QUICK | changes)


@pytest.fixture(scope="module")
def stage_1(walkers, tmp_path_factory):
    "The recipe and the folder of runs of a finished first step."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CION_NB_RUNS", str(tmp_path_factory.mktemp("runs")))
        asked = quick(walkers, method="mean")
        return asked, video_reid(asked).folder.parent


@pytest.fixture
def first(stage_1, monkeypatch):
    monkeypatch.setenv("CION_NB_RUNS", str(stage_1[1]))
    return stage_1[0]


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("changes", [dict(method="dense"), dict(method="dense", memory="mixed", step="relative"),
                                     dict(method="cross", step="none"), dict(method="self")],
                         ids=["dense", "mixed, relative", "cross without STEP-Emb", "self"])
def test_a_decoder_trains_is_scored_and_comes_back_over_a_network_that_stays(walkers, first, changes):
    run = video_reid(quick(walkers, weights=first, **changes))
    model, stored = load_model(run.folder), Features.open(run.folder / "test-features")
    encoder = load_backbone(Run(first).folder / "backbone.safetensors")
    kept = model.backbone.encoder.state_dict()                           # with BatchNorm's statistics
    for name, value in encoder.state_dict().items(): assert torch.equal(value, kept[name]), name
    assert model.input.frames == 3 and not model.training
    again = extract_clips(stored_samples(walkers), walkers.parent, model, run.folder / "again")
    np.testing.assert_array_equal(again.x, stored.x)
    x, (query, gallery) = np.asarray(stored.x, np.float32), sides(stored.samples)
    score = evaluate(x[query], x[gallery], stored.samples.iloc[query], stored.samples.iloc[gallery])
    assert run.result["mAP"] == pytest.approx(score.mAP) and len(stored) == 16
    assert f"{score.n_gallery} gallery tracklets" in str(score)
    assert {"cross_entropy", "triplet", "accuracy"} <= set(pd.DataFrame(run.read_log()))


def stored_samples(walkers):
    samples = read_samples(walkers)
    return samples[samples.split != "train"].reset_index(drop=True)


@pytest.mark.slow("trains networks")
def test_the_first_step_is_a_backbone_for_anything(walkers, first):
    run = Run(first)
    model = load_clip_model(run.folder)
    assert model.backbone.model.name == load_backbone(run.folder / "backbone.safetensors").name
    x = torch.randn(2, 3, 3, 64, 32)
    with torch.no_grad():
        plain = model.neck(torch.stack([model.backbone.model(clip).mean(0) for clip in x]))
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-4)
    assert run.result["train_tracklets"] == 16 and run.result["train_ids"] == 4


@pytest.mark.slow("trains networks")
def test_a_run_that_is_killed_ends_in_the_same_bits(walkers, first, monkeypatch):
    class Killed(Exception): pass
    asked = quick(walkers, method="dense", weights=first, checkpoint_minutes=0, seed=3)
    through = VideoFineTuning(asked)
    fit(through, Run(asked, Run(asked).folder.with_name("through")))
    run, steps = Run(asked), []
    class Dies(VideoFineTuning):
        def loss(self, *args):
            steps.append(1)
            if len(steps) == 4: raise Killed
            return super().loss(*args)
    with pytest.raises(Killed): fit(Dies(asked), run)
    again = VideoFineTuning(asked)
    report = fit(again, run)
    assert report["resumed"] == 1
    for name, value in through.modules["model"].state_dict().items():
        assert torch.equal(value, again.modules["model"].state_dict()[name]), name


@pytest.mark.parametrize("method", [method for method in METHODS if method != "vills"])   # in test_vills_training.py
@pytest.mark.parametrize("distance, margin", [("cosine", .3), ("euclidean", None)])
def test_the_loss_is_cross_entropy_and_triplets_on_the_batchnorms_output(walkers, method, distance, margin, tmp_path):
    asked = quick(walkers, method="mean", distance=distance, margin=margin, triplet_weight=2.)
    task = VideoFineTuning(asked)
    weights = tmp_path / "encoder.safetensors"
    from cion_nb.models.backbones import create_backbone, save_backbone
    save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)), weights)
    task.recipe = asked | dict(method=method, weights=str(weights))
    task.build("cpu")
    model = task.modules["model"].train()
    batch = task.load(next(iter(task.sampler(0, 0, 0, 0, 1))), 0)
    assert sorted(np.bincount(batch["pid"], minlength=4)) == [2, 2, 2, 2]
    loss, told = task.loss(model, batch, SimpleNamespace(num_processes=1))
    torch.manual_seed(0)
    seen = []
    model.neck.register_forward_hook(lambda module, args, out: seen.append(out))
    features, logits = model(pixels_of(task, batch))
    assert torch.equal(features, seen[0])                                # what BatchNorm gives, not what it takes
    wanted = plain_triplet(features.detach(), batch["pid"], margin, distance)
    assert float(told["triplet"]) == pytest.approx(float(wanted), abs=1e-4)
    cross_entropy = -logits.detach().log_softmax(1)[torch.arange(8), batch["pid"]].mean()
    assert float(loss.detach()) == pytest.approx(float(cross_entropy + 2 * wanted), rel=1e-4)


def plain_triplet(x, pid, margin, distance):
    "Batch-hard, from the definition."
    losses = []
    for i in range(len(x)):
        d = [1 - float(x[i] @ x[j] / x[i].norm() / x[j].norm()) if distance == "cosine" else float((x[i] - x[j]).norm())
             for j in range(len(x))]
        far = max(d[j] for j in range(len(x)) if pid[j] == pid[i])
        near = min(d[j] for j in range(len(x)) if pid[j] != pid[i])
        losses.append(np.log1p(np.exp(far - near)) if margin is None else max(far - near + margin, 0))
    return np.mean(losses)


def pixels_of(task, batch):
    from cion_nb.video.clips import clip_input
    return clip_input(batch["pixels"], batch["boxes"], batch["noise"], task.modules["model"].input,
                      task.recipe["erasing_fill"])


def test_the_encoder_is_in_eval_mode_at_every_step(walkers, tmp_path):
    from cion_nb.models.backbones import create_backbone, save_backbone
    weights = tmp_path / "encoder.safetensors"
    save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)), weights)
    asked, modes = quick(walkers, method="dense", weights=str(weights)), []
    class Watched(VideoFineTuning):
        def loss(self, model, *args):
            modes.append([m.training for m in self.modules["model"].backbone.encoder.modules()])
            return super().loss(model, *args)
    fit(Watched(asked), Run(asked, tmp_path / "run"))
    assert len(modes) == 8 and not any(map(any, modes))


def test_rates_fall_to_a_tenth_at_every_drop():
    rates = [video_lr(epoch, 3e-4, [60., 120., 180.]) for epoch in range(240)]
    assert rates == pytest.approx([3e-4] * 60 + [3e-5] * 60 + [3e-6] * 60 + [3e-7] * 60)
    assert video_lr(0, 1., [], 4) == .01 and video_lr(4, 1., [], 4) == 1


def changed(walkers, tmp_path, change):
    samples = change(read_samples(walkers))
    write_samples(samples, tmp_path / "samples.parquet")
    return dict(data=str(tmp_path / "samples.parquet"), data_root=str(walkers.parent))


@pytest.mark.parametrize("change, said", [
    (lambda t: t.assign(pid=np.where(t.tracklet == 0, np.arange(len(t)) % 2, t.pid)), "tracklet 0"),
    (lambda t: t.assign(tracklet=-1), "tracklet"),
    (lambda t: t.assign(pid=0), "two people"),
    (lambda t: t.assign(split="train"), "no image for"),
    (lambda t: t.assign(camid=0), "none of the .* query tracklets has a match")])
def test_data_that_cannot_work_is_refused(walkers, tmp_path, change, said):
    asked = quick(walkers, method="mean", **changed(walkers, tmp_path, change))
    with pytest.raises(ValueError, match=said): video_reid(asked)


@pytest.mark.parametrize("changes, said", [
    (dict(method="dense"), "trains a decoder over a frozen network, and weights is none"),
    (dict(method="sparse"), "method 'sparse' is not known"), (dict(method="mean", k=3), "3"),
    (dict(weights=recipe("finetune", "tiny", backbone="resnet18")), "backbone='resnet10_tiny_ibn', but the run"),
    (dict(weights=recipe("finetune", "tiny", image_size=[128, 64])), r"image_size=\[64, 32\], but the run")])
def test_recipes_that_cannot_work_are_refused(walkers, changes, said):
    with pytest.raises(ValueError, match=said): video_reid(quick(walkers, **changes))


def test_stripes_that_do_not_divide_are_refused(walkers, tmp_path):
    from cion_nb.models.backbones import create_backbone, save_backbone
    save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)), tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="P=5 stripes do not divide"):
        make_clip_model(quick(walkers, method="dense", weights=str(tmp_path / "encoder.safetensors"), stripes=5), 4)


def test_one_tracklet_a_person_stands_k_times_with_a_warning(walkers, tmp_path):
    data = changed(walkers, tmp_path, lambda t: t[(t.split != "train") | (t.tracklet % 4 == 0)].reset_index(drop=True))
    task = VideoFineTuning(quick(walkers, method="mean", k=4, **data))
    with pytest.warns(UserWarning, match="have one tracklet"): batch = next(iter(task.sampler(0, 0, 0, 0, 1)))
    assert len(batch) == 8 and len(set(batch)) == 2
    tracklets = np.searchsorted(task.clips.table.first_row, batch)
    assert len({tuple(rows) for rows in task.clips.rows(tracklets, 0)}) > 2                    # other frames

"""What a run of clips refuses or tells: what it starts from, its levels and batches, its data, models that return."""
import json
import warnings

import numpy as np
import pytest
import torch
from examples import quiet, warned
from PIL import Image

from cion_nb.companion.commands import main
from cion_nb.companion.score import load_model, score
from cion_nb.core.runs import Run, run_hash
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.models.architectures import InputSpec
from cion_nb.models.backbones import create_backbone, save_backbone
from cion_nb.video.clips import extract_clips
from cion_nb.video.denseil import DenseIL
from cion_nb.video.video_reid import (
    check_video_reid,
    draw_clip_model,
    load_clip_model,
    make_clip_model,
    save_clip_model,
    video_reid,
    VideoFineTuning,
)

torch.set_num_threads(1)
QUICK = dict(epochs=1, images_per_epoch=8, batch_size=8, k=2, frames=2, width=16, heads=2, blocks=1, warmup_epochs=0,
             drops=[], precision="fp32", channels_last=False)


def quick(walkers, **changes):
    return recipe("video_reid", "tiny", **dict(data=str(walkers)) | QUICK | changes)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A folder as a run leaves it, of a network that learned from other colours."
    encoder, folder = create_backbone("resnet10_tiny_ibn", (64, 32)), tmp_path_factory.mktemp("start")
    encoder.input = InputSpec(64, 32, mean=(.5, .5, .5))
    save_backbone(encoder, folder / "backbone.safetensors")
    (folder / "log.jsonl").write_text("{}")
    return folder


# ── what it starts from ──
def test_a_runs_folder_is_its_backbone(walkers, start):
    by_folder, by_file = (quick(walkers, method="self", weights=str(path))
                          for path in (start, start / "backbone.safetensors"))
    a, b = (make_clip_model(asked | dict(mean=[.5, .5, .5]), 4)[0].backbone.encoder.state_dict()
            for asked in (by_folder, by_file))
    assert all(torch.equal(a[name], b[name]) for name in b)
    before = run_hash(by_folder)
    (start / "log.jsonl").write_text("{}\n{}")
    assert run_hash(by_folder) == before, "what else lies in the folder is no part of the request"


@pytest.mark.parametrize("changes, says", [
    (dict(backbone="resnet18"), "backbone='resnet18', but weights=.* has 'resnet10_tiny_ibn': use the same"),
    (dict(image_size=[128, 64]), r"image_size=\[128, 64\], but weights=.* has \[64, 32\]: use the same")])
def test_a_network_of_another_kind_or_size(walkers, start, changes, says):
    for weights in (start, start / "backbone.safetensors"):
        asked = quick(walkers, method="dense", weights=str(weights), **changes)
        with pytest.raises(ValueError, match=says): check_video_reid(asked)


def test_a_frozen_network_is_not_given_other_colours_without_a_word(walkers, start):
    made = quick(walkers, method="cross", weights=str(start))
    said = warned(make_clip_model, made, 4)[1]
    assert len(said) == 1 and "mean=[0.485, 0.456, 0.406]" in said[0] and "mean=[0.5, 0.5, 0.5]" in said[0]
    for fine in (dict(mean=[.5, .5, .5]), dict(method="mean")):
        assert not warned(make_clip_model, made | fine, 4)[1]


def test_a_folder_without_a_backbone(walkers, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no backbone.safetensors.*video_reid method=mean"):
        make_clip_model(quick(walkers, method="dense", weights=str(tmp_path)), 4)


# ── levels and batches ──
@pytest.mark.parametrize("changes, says", [
    (dict(taps=[9]), r"taps=\[9\]: name levels of resnet10_tiny_ibn from low to high, each once, of 0 to 4"),
    (dict(taps=[-1]), "of 0 to 4"), (dict(taps=[]), "of 0 to 4"), (dict(taps=[1, 1]), "each once"),
    (dict(taps=[4, 1]), "from low to high"), (dict(stripes=3), "P=3 stripes do not divide level 1.*stripes="),
    (dict(taps=[4], stripes=3), "which is 4 high for 64x32"),
    (dict(heads=3), "d=16 .width=. is no multiple of heads=3")])
def test_levels_that_there_are_not(walkers, changes, says):
    with pytest.raises(ValueError, match=says): draw_clip_model(quick(walkers, method="dense") | changes, 4)


@pytest.mark.parametrize("changes", [dict(k=3), dict(k=8), dict(batch_size=2, k=2)])
def test_a_batch_of_one_person_or_of_no_whole_people(walkers, changes):
    asked = quick(walkers, method="mean", **changes)
    with pytest.raises(ValueError, match=f"k={asked['k']}: .*at least two people.*{2 * asked['k']} or more"):
        check_video_reid(asked)


def test_a_network_without_batchnorm_stays_as_it_is():
    encoder = create_backbone("edgenext_x_small", (64, 64))
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    model = DenseIL(encoder, T=2, P=2, d=16, heads=2, blocks=1).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model(torch.rand(2, 2, 3, 64, 64)).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1).step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.slow("traces networks")
@pytest.mark.parametrize("step, memory", [("relative", "mixed")])
def test_a_decoder_leaves_with_an_open_batch(step, memory):
    model = DenseIL(create_backbone("resnet10_tiny_ibn", (64, 32)), "dense", memory, T=2, P=2, d=16, heads=2, blocks=1,
                    step=step).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (torch.zeros(2, 2, 3, 64, 32),),
                                      dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.rand(3, 2, 3, 64, 32)
    with torch.no_grad(): torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


# ── data ──
def changed(walkers, folder, change):
    write_samples(change(read_samples(walkers)).reset_index(drop=True), folder / "samples.parquet")
    return dict(data=str(folder / "samples.parquet"), data_root=str(walkers.parent))


def test_tracklets_of_one_frame_repeat_it(walkers, tmp_path):
    data = changed(walkers, tmp_path, lambda t: t.groupby("tracklet").head(1))
    task = VideoFineTuning(quick(walkers, method="mean", flip=0., erasing=0., frames=3, **data))
    pixels = task.load(next(iter(task.sampler(0, 0, 0, 0, 1))), 0)["pixels"]
    assert pixels.shape[1] == 3 and torch.equal(pixels[:, 0], pixels[:, 1]) and torch.equal(pixels[:, 0], pixels[:, 2])


def test_two_people_in_a_tracklet_by_row_and_remedy(walkers, tmp_path):
    rows = read_samples(walkers)
    at = rows.index[rows.tracklet == 0][1]
    data = changed(walkers, tmp_path, lambda t: t.assign(pid=np.where(t.index == at, 3, t.pid)))
    with pytest.raises(ValueError, match=f"tracklet 0 has 2 values of pid, .* at {rows.path[at]}: .*mixed='most'"):
        VideoFineTuning(quick(walkers, method="mean", **data))
    task = VideoFineTuning(quick(walkers, method="mean", mixed="most", **data))
    assert task.clips.table.pid.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_people_with_one_tracklet_are_told_by_pid(walkers, tmp_path):
    data = changed(walkers, tmp_path, lambda t: t[(t.pid != 2) | (t.tracklet % 4 == 0)].assign(pid=t.pid + 70))
    task = VideoFineTuning(quick(walkers, method="mean", **data))
    said = warned(task.sampler, 0, 0, 0, 0, 1)[1]
    assert len(said) == 1 and "1 of 4 people have one tracklet" in said[0] and said[0].endswith(": 72")


@pytest.mark.slow("trains a network")
def test_damaged_frames_out_of_order_and_people_on_both_sides_are_told(walkers, tmp_path, monkeypatch, capsys):
    "By the command; its score is that of `score`, which takes the frames that the run was tested with."
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    rows = read_samples(walkers)
    for path in rows.path: (tmp_path / path).write_bytes((walkers.parent / path).read_bytes())
    (tmp_path / rows.path[1]).write_bytes(b"")
    Image.new("RGB", (16, 32)).save(tmp_path / rows.path[2])
    rows.loc[rows.split == "train", "pid"] += 3                          # person 4 is on both sides
    write_samples(rows.iloc[::-1].reset_index(drop=True), tmp_path / "samples.parquet")
    asked = quick(walkers, method="mean", frames=4, sampling="all", data=str(tmp_path / "samples.parquet"))
    (tmp_path / "recipe.json").write_text(json.dumps(asked))
    assert main(["video_reid", "--recipe", str(tmp_path / "recipe.json")]) == 0
    run, said = Run(asked), capsys.readouterr().err
    assert said.count("frames out of order, which were sorted") == 2
    assert f"{rows.path[1]}: zero bytes; replaced by another image of tracklet 0" in said
    assert "are in the train split and among the queries (4, 5, 6)" in said
    assert run.result["unreadable"] == 1 and run.result["people_in_both"] == 3
    model = load_model(run.folder)
    found = quiet(score, model, str(tmp_path / "samples.parquet"), out=tmp_path / "scored")
    assert found.mAP == run.result["mAP"]
    out = tmp_path / "extracted"
    assert main(["extract", str(tmp_path / "samples.parquet"), "--model", str(run.folder), "--out", str(out)]) == 0
    assert "Features(32 x 256" in capsys.readouterr().out


# ── models that come back ──
def test_another_length_is_refused_with_both_numbers(walkers, start, tmp_path):
    asked = quick(walkers, method="dense", weights=str(start), frames=3)
    save_clip_model(draw_clip_model(asked, 4), tmp_path, asked)
    with pytest.raises(ValueError, match="n_frames=5, but this model takes clips of 3 frames"):
        extract_clips(read_samples(walkers), walkers.parent, load_clip_model(tmp_path), tmp_path / "f", n_frames=5)
    card = json.loads((tmp_path / "clips.json").read_text())
    (tmp_path / "clips.json").write_text(json.dumps(card | dict(frames=5)))
    with pytest.raises(ValueError, match=r"step.frame.*\[3, 1, 16\].*\[5, 1, 16\]"): load_clip_model(tmp_path)
    del card["width"]
    (tmp_path / "clips.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="is no card that save_clip_model wrote: it lacks width"):
        load_clip_model(tmp_path)


def test_a_start_that_is_asked_for_and_not_there(walkers, tmp_path, monkeypatch):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path))
    first = quick(walkers, method="mean")
    with pytest.raises(LookupError, match="compute it with .*video_reid"):
        video_reid(quick(walkers, method="dense", weights=first))

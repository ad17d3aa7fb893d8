"""Real clips from video file to score, and tracklets of one frame. Skipped where ../shared/data is missing."""
import numpy as np
import pandas as pd
import pytest
import torch
from places import DATA

from cion_nb.core.samples import write_samples
from cion_nb.core.settings import recipe
from cion_nb.data.datasets import read_viper
from cion_nb.data.detectors import read_mot
from cion_nb.data.tracking import cut_tracks
from cion_nb.data.tracking_scores import match_truth
from cion_nb.models.architectures import InputSpec
from cion_nb.models.backbones import create_backbone
from cion_nb.models.features import extract, OnnxModel
from cion_nb.video.clips import cut_in_time, extract_clips, TemporalMean, tracklet_table
from cion_nb.video.denseil import DenseIL
from cion_nb.video.video_reid import load_clip_model, video_reid

needs_clips = pytest.mark.skipif(not (DATA / "video").is_dir(), reason="the folder with real clips is not here")
needs_viper = pytest.mark.skipif(not (DATA / "viper").is_dir(), reason="VIPeR is not here")
pytestmark = pytest.mark.slow("real images and clips")


@pytest.fixture(scope="module")
def campus_and_street(tmp_path_factory):
    "Halves of the true tracks: TUD-Campus trains, every fourth frame of TUD-Stadtmitte is tested on."
    pytest.importorskip("cv2", reason="needs the extra [track]")
    root, tables = tmp_path_factory.mktemp("tud"), []
    for i, (name, stride) in enumerate((("TUD-Campus", 1), ("TUD-Stadtmitte", 4))):
        clip = DATA / "video" / name
        known = cut_tracks(next(clip.glob("*.mp4")), root / name, clip / "gt/gt.txt", are_people=True, stride=stride)
        truth = read_mot(clip / "gt/gt.txt")
        assert len(known) == (truth["frame"] % stride == 0).sum() and known["pid"].nunique() == truth["id"].nunique()
        assert (match_truth(known, clip / "gt/gt.txt") == known["pid"]).mean() > .97
        cut = cut_in_time(known)
        split = np.where(cut["part"] == 0, "query", "gallery") if i else "train"
        tables.append(cut.assign(path=f"{name}/" + cut["path"], pid=cut["pid"] + 100 * i, split=split,
                                 tracklet=cut["tracklet"] + 100 * i))
    write_samples(pd.concat(tables, ignore_index=True), root / "clips.parquet")
    return root / "clips.parquet", pd.concat(tables, ignore_index=True)


@needs_clips
def test_from_video_to_score(campus_and_street, tmp_path, monkeypatch):
    file, samples = campus_and_street
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path))
    table = tracklet_table(samples)
    assert table["split"].value_counts().to_dict() == dict(train=16, query=10, gallery=10)
    assert (table.groupby("pid")["n_frames"].agg(np.ptp) <= 1).all() and table.groupby("pid").size().eq(2).all()
    quick = dict(data=str(file), protocol="no_camera", k=2, epochs=1, images_per_epoch=16, batch_size=8, frames=4,
                 width=32, heads=4, blocks=1, warmup_epochs=0)
    first = recipe("video_reid", "small", method="mean", **quick)
    for run in (video_reid(first), video_reid(recipe("video_reid", "small", method="dense", weights=first, **quick))):
        assert run.result["n_query"] == 10 and run.result["n_gallery"] == 10 and run.result["n_unmatched"] == 0
        assert run.result["train_tracklets"] == 16 and run.result["train_ids"] == 8 and 0 < run.result["mAP"] <= 1
    model, test = load_clip_model(run.folder), samples[samples["split"] != "train"]
    every = extract_clips(test, file.parent, model, tmp_path / "all", sampling="all")
    assert len(every) == 20 and np.isfinite(np.asarray(every.x, np.float32)).all()


@needs_clips
def test_a_real_extractor_finds_the_other_half(campus_and_street, tmp_path):
    "Mean over frames of another project's network: far above the tenth that chance gives."
    pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
    file, samples = campus_and_street
    weights = DATA / "weights/person-reidentification-retail-0287.onnx"
    if not weights.exists(): pytest.skip("the extractor is not here")
    model = OnnxModel(weights, InputSpec(256, 128, "NHWC", "BGR", 1.0, (0, 0, 0), (1, 1, 1)))
    test = samples[samples["split"] != "train"]
    found = extract_clips(test, file.parent, TemporalMean(model, 4), tmp_path / "features")
    x, table = np.asarray(found.x, np.float32), found.samples
    query, gallery = (np.flatnonzero(table["split"] == side) for side in ("query", "gallery"))
    nearest = gallery[(x[query] @ x[gallery].T).argmax(1)]
    assert (table["pid"].to_numpy()[nearest] == table["pid"].to_numpy()[query]).mean() >= .6


@needs_viper
def test_a_tracklet_of_one_frame_is_its_picture(tmp_path):
    table = read_viper(DATA / "viper").query("split == 'query'").head(12).reset_index(drop=True)
    stills = table.assign(tracklet=np.arange(12), frame=0)
    torch.manual_seed(0)
    encoder = create_backbone("resnet10_tiny_ibn", (64, 32)).eval()
    how = dict(precision="float32", workers=1)
    images = extract(table, DATA / "viper", encoder, tmp_path / "images", **how)
    for sampling in ("chunks", "all"):
        mean = extract_clips(stills, DATA / "viper", encoder, tmp_path / sampling, n_frames=8, sampling=sampling, **how)
        np.testing.assert_allclose(mean.x, images.x, atol=1e-5)
    model = DenseIL(encoder, T=3, d=32, heads=4).eval()
    clips = [extract_clips(stills, DATA / "viper", model, tmp_path / f"dense_{s}", sampling=s, **how).x
             for s in ("chunks", "all")]
    thrice = pd.concat([stills.assign(frame=i) for i in range(3)])
    clips.append(extract_clips(thrice, DATA / "viper", model, tmp_path / "thrice", **how).x)
    for other in clips[1:]: np.testing.assert_allclose(other, clips[0], atol=1e-6)

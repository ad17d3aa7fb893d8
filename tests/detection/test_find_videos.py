"""Folders of videos: what find makes of them, in parts and after a kill, and a training by their frames."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from places import ROOT
from street import COLOURS, Seeing, write_street

from cion_nb.companion.commands import main
from cion_nb.companion.reproduce import denoise_features
from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe
from cion_nb.core.store import Features
from cion_nb.data.tracking import track_videos
from cion_nb.data.videos import Video
from cion_nb.detection import find as room
from cion_nb.detection.find import find, find_in_videos, VideoFrames
from cion_nb.detection.idfree import IdFree, idfree
from cion_nb.detection.pointid import PointID, save_pointid
from cion_nb.identities.denoise import denoise, Denoised

N, STRIDE = 40, 4
QUICK = dict(image_size=[64, 96], channels=8, dim=8, epochs=1, images_per_epoch=4, batch_size=4, lr_per=4, drops=[1.],
             precision="fp32", channels_last=False)


class Sees(Seeing):
    "The rectangles by their colour, in the place of a network."
    def __init__(self, *of_pointid): super().__init__()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Two videos, one in a folder, one that is none and one that breaks off."
    root = tmp_path_factory.mktemp("films")
    (root / "hall").mkdir()
    for seed, name in enumerate(("b.avi", "hall/a.avi", "cut.avi")): write_street(root / name, N, seed=seed)
    whole = (root / "cut.avi").read_bytes()
    (root / "cut.avi").write_bytes(whole[:len(whole) // 2])
    (root / "hall" / "none.mp4").write_bytes(b"no video")
    (root / "notes.txt").write_text("not a video")
    return root


@pytest.fixture
def asked(films, runs, monkeypatch):
    "A recipe of find over these videos, by a network that sees."
    torch.manual_seed(0)
    save_pointid(PointID("resnet10_tiny_ibn", channels=8, dim=8, size=(64, 96)), runs / "first")
    monkeypatch.setattr(room, "PointDetector", Sees)
    return recipe("find", "tiny", data="videos", data_root=str(films), model=str(runs / "first"), stride=STRIDE)


def video_recipe(asked, **changes):
    return recipe("idfree", "tiny", **dict(data="videos", data_root=asked["data_root"], method="video", stride=STRIDE,
                                           weights=asked["model"], min_span=.3) | QUICK | changes)


def test_every_stride_th_frame_of_every_video_that_can_be_read(asked, films):
    run = find(asked)
    store, videos = Features.open(run.folder), pd.read_parquet(run.folder / "videos.parquet").set_index("video")
    assert store.unreadable["path"].tolist() == ["hall/none.mp4"] == run.result["unreadable_names"]
    assert (run.result["files"], run.result["videos"], run.result["broken_off"]) == (4, 3, 1)
    assert run.result["frames"] == videos.looked.sum() and run.result["boxes"] == len(store)
    assert (videos.loc["b.avi", ["read", "width", "height"]].tolist()) == [N, 320, 240] and store.x.dtype == np.float16
    assert 0 < videos.loc["cut.avi", "read"] < N == videos.loc["cut.avi", "announced"]
    rows = []
    for name in ("b.avi", "cut.avi", "hall/a.avi"):
        for number, picture in Video(films / name).frames(STRIDE):
            boxes, scores, x = Sees()._one(picture())
            rows += [(f"{name}/{number:06d}", name, number, *box, *look) for box, look in zip(boxes, x)]
    got = store.samples
    assert list(zip(got.path, got.video, got.frame)) == [row[:3] for row in rows]
    corners = np.stack([got.x, got.y, got.x + got.w, got.y + got.h], 1)
    np.testing.assert_allclose(corners, np.array([row[3:7] for row in rows], np.float32), atol=1e-4)
    looks = np.array([row[7:] for row in rows])
    np.testing.assert_allclose(store.x, looks / np.linalg.norm(looks, axis=1, keepdims=True), atol=2e-3)
    assert not (run.folder / "videos").exists()


def test_parts_and_kills_leave_the_same(asked, films, runs, monkeypatch):
    "What two machines and a killed process leave is what one makes; a file that was cut off is made again."
    whole = find(asked | dict(min_score=.31)).folder
    for shard in ((0, 2), (1, 2)): assert not find(asked, shard).is_done
    folder = Run(asked).folder
    files = sorted((folder / "videos").rglob("*.npz"))
    assert len(files) == 4
    files[0].write_bytes(files[0].read_bytes()[:200])
    files[2].unlink()
    seen = []
    real = room._find_video
    monkeypatch.setattr(room, "_find_video", lambda path, *more: (seen.append(path.name), real(path, *more)))
    run = find(asked)
    assert seen == ["b.avi", "a.avi"] and find(asked, (0, 2)).is_done and len(seen) == 2
    for name in ("features.npy", "samples.parquet", "unreadable.parquet"):
        assert (run.folder / name).read_bytes() == (whole / name).read_bytes(), name
    with pytest.raises(ValueError, match="holds what another detector found"):
        find_in_videos(["b.avi"], films, Sees(), run.folder, STRIDE)


def test_a_training_sees_frames_of_the_videos_and_keeps_them_once(asked, films, runs):
    made = video_recipe(asked)
    assert made["found"] == asked
    find(asked)
    task = IdFree(made)
    names = task.samples["video"].unique()
    assert set(names) <= {"b.avi", "cut.avi", "hall/a.avi"} and len(names) > 1
    kept = Run(asked).folder / "frames" / "64x96"
    for row in (0, len(task.samples) - 1):
        video, number = task.samples.loc[row, ["video", "frame"]]
        picture = task.data.picture(task.samples["path"][row])
        assert picture.shape == (64, 85, 3) and (kept / f"{video}.zip").is_file()
        for box in task._boxes(row)[0]:                                   # the middle of each box has a person's colour
            x, y = (box[:2] + box[2:] / 2).astype(int)
            assert min(np.abs(picture[y, x, ::-1].astype(int) - c).max() for c in COLOURS) < 60
    batch = task.load(np.arange(4), 0)
    shutil.rmtree(kept)
    again = IdFree(made).load(np.arange(4), 0)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    run = idfree(made)
    assert run.result["pseudo_videos"] == 3 and run.result["pseudo_people"] >= 4


def test_a_video_that_has_gone_is_replaced_and_named(asked, films, runs, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(films, own)
    asked |= dict(data_root=str(own))
    found = find(asked).folder
    task = IdFree(video_recipe(asked))
    (own / "b.avi").unlink()
    row = int(np.flatnonzero(task.samples["video"] == "b.avi")[-1])
    with pytest.warns(UserWarning, match="b.avi/.*no such file; another frame takes its place"): task.views(row, 0)
    assert list(task.images.reasons) == [row]
    frames = VideoFrames(own, found / "x", {"cut.avi": [N - 1]}, (64, 96))
    with pytest.raises(OSError, match=f"its frame {N - 1} is not in .*the video has changed"):
        frames(f"cut.avi/{N - 1:06d}")


def test_a_video_of_one_frame_and_of_nobody(asked, tmp_path):
    for name, people in (("one.avi", 4), ("empty.avi", 0)): write_street(tmp_path / name, 1, people)
    run = find(asked | dict(data_root=str(tmp_path)))
    assert (run.result["files"], run.result["videos"], run.result["frames"]) == (2, 1, 2)
    with pytest.raises(ValueError, match="no trajectory was kept in any of 1 video"):
        IdFree(video_recipe(asked | dict(data_root=str(tmp_path))))
    (tmp_path / "one.avi").unlink()
    (tmp_path / "none.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"nobody was found in 2 videos.*1 cannot be read: none.mp4 \(zero bytes"):
        find(asked | dict(data_root=str(tmp_path)))


# ---------------------------------------------------------------- labels=denoise

def test_identities_of_denoise_are_labels(asked, runs):
    "Of boxes that a tracker joined; a pair is of one video, also where a person is known in several."
    made = video_recipe(asked, labels="denoise")
    made = video_recipe(asked, labels="denoise", denoised=made["denoised"] | dict(sigma_cst=.5, sigma_drm=.3))
    searched = made["denoised"]["features"]
    assert searched == asked | dict(tracker="embedding") and made["found"] is None
    found = Features.open(find(searched).folder)
    assert (found.samples.tracklet >= 0).all() and found.samples.groupby("tracklet").video.nunique().max() == 1
    assert Run(searched).result["tracklets"] == found.samples.tracklet.nunique()
    denoised = Denoised.load(denoise_features(made["denoised"]).folder)
    task = IdFree(made)
    data = task.data
    for i, frame in data.frames.iterrows():
        own = slice(frame["first"], frame["first"] + frame["count"])
        want = denoised.labels[(found.samples.path == frame.path).to_numpy()]
        assert len(set(want)) == len(want) and sorted(data.labels[own]) == sorted(want), frame.path
    people = set(denoised.labels[denoised.labels >= 0])
    assert len(data.boxes) == len(found) and data.told["denoised_people"] == len(people)
    shared = found.samples.assign(label=denoised.labels).groupby("label").video.nunique()
    assert shared.max() > 1, "people of one colour are one identity over videos"
    for row, others in enumerate(task.partners):
        assert set(task.samples.video[others]) == {task.samples.video[row]}
    assert idfree(made).result["denoised_boxes"] == int((denoised.labels >= 0).sum())


def test_crops_of_track_and_their_identities_are_labels(asked, films, runs, tmp_path):
    "What `track` kept of two videos, denoised: each box has its crop's identity; other folders and data are named."
    names = ["b.avi", "hall/a.avi"]
    tracked = track_videos([films / name for name in names], tmp_path / "tracks", Seeing(), tracker="embedding",
                           min_height=20, features=True, stride=STRIDE)
    store = Features.open(tmp_path / "tracks" / "features")
    found = denoise(store.x, store.samples, sigma_cst=.5, sigma_drm=.3, out=tmp_path / "identities")
    made = video_recipe(asked, labels="denoise", denoised=str(tmp_path / "identities"), found=str(store.folder))
    task = IdFree(made)
    of = dict(zip(("b", "a"), names))
    want = {(f"{of[v]}/{f:06d}", label) for v, f, label in zip(tracked.video, tracked.frame, found.labels)}
    data, got = task.data, set()
    for i, frame in data.frames.iterrows():
        got |= {(frame.path, label) for label in data.labels[frame["first"]:frame["first"] + frame["count"]]}
    assert got == want and len(data.boxes) == len(tracked) and found.labels.max() == 3
    own = slice(0, data.frames["count"].iloc[0])
    first = tracked[(tracked.video == Path(data.frames.video[0]).stem) & (tracked.frame == data.frames.frame[0])]
    scale = np.array([85 / 320, 64 / 240] * 2)                                      # of the pictures that are kept
    np.testing.assert_allclose(np.sort(data.boxes[own], 0), np.sort(first[["x", "y", "w", "h"]] * scale, 0), rtol=1e-4)
    assert task.load(np.arange(2), 0)["label"].max() >= 0
    assert IdFree(made | dict(labels="pseudo", denoised=None)).data.told["pseudo_people"] >= 4
    for changes, said in ((dict(found=None), "name in found the folder of features that it was"),
                          (dict(data_root=str(films / "hall")), "frame 0 of video 'b' is not in data='videos'")):
        with pytest.raises(ValueError, match=said): IdFree(made | changes)
    shutil.copytree(films, tmp_path / "films")
    shutil.copy(films / "b.avi", tmp_path / "films" / "hall" / "b.avi")
    with pytest.raises(ValueError, match="b.avi and hall/b.avi have one name"):
        IdFree(made | dict(data_root=str(tmp_path / "films")))


def test_tracklets_of_pictures_are_those_of_the_video(street, asked):
    "Frames with a name of their video are joined as well."
    run = find(recipe("find", "tiny", data=str(street), model=asked["model"], tracker="embedding"))
    got = Features.open(run.folder)
    assert got.samples.groupby("tracklet").video.nunique().max() == 1 and (got.samples.tracklet >= 0).all()


@pytest.mark.parametrize("changes, said", [
    (dict(labels="denoise", denoised=dict(stage="find")), "denoised is a run of 'find': name one of denoise"),
    (dict(labels="denoise", denoised=dict(stage="denoise")), "denoised is of stage 'extract': a run of find"),
    (dict(labels="denoise", denoised=dict(stage="denoise", features=dict(stage="find", data="videos"))),
     "over boxes without tracklets.*tracker='embedding'"),
    (dict(denoised=dict(stage="denoise")), "denoised is read by labels=denoise, and labels='pseudo'"),
    (dict(method="image", found=None), "data=videos comes without boxes, and labels='box'"),
    (dict(weights=None), "name that run of idfree in weights"),
    (dict(data="mot"), "stride=4 is of data=videos")])
def test_what_a_training_from_videos_refuses(asked, runs, changes, said):
    with pytest.raises(ValueError, match=said): idfree(video_recipe(asked, **changes))


def test_what_find_refuses(asked, tmp_path):
    for changes, error, said in ((dict(frames="test"), ValueError, "videos have no test"),
                                 (dict(data_root=None), ValueError, "data='videos' needs data_root"),
                                 (dict(data_root=str(tmp_path / "no")), FileNotFoundError, "no folder"),
                                 (dict(data="mot", data_root="x"), ValueError, "stride=4 is of data=videos"),
                                 (dict(data_root=str(tmp_path)), FileNotFoundError, "holds no video: no file ends in")):
        with pytest.raises(error, match=said): find(asked | changes)


# ---------------------------------------------------------------- commands

def test_the_commands(asked, films, runs, capsys):
    "find in two parts, and a look at what would be trained; the frames' run is the one that the training asks for."
    line = ["--profile", "tiny", "--set", "data=videos", f"data_root={films}", f"stride={STRIDE}"]
    for shard in (["--shard", "0/2"], ["--shard", "1/2"], []):
        assert main(["find", *line, f"model={runs / 'first'}", *shard]) == 0
    assert Run(asked).is_done and capsys.readouterr().out.splitlines()[-1] == str(Run(asked).folder)
    quick = [f"{k}={json.dumps(v)}" for k, v in QUICK.items()]
    more = ["method=video", f"weights={runs / 'first'}", "min_span=0.3", *quick]
    assert main(["idfree", *line, *more, "--check"]) == 0
    assert json.loads(capsys.readouterr().out)["found"] == asked
    assert main(["idfree", *line, *more]) == 0


def test_the_job_script_shares_the_videos_and_joins(tmp_path):
    "It looks at the settings, submits an array, and behind it a job that joins; inside, each does its part."
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> ' + str(tmp_path / "called"))
    (tmp_path / "python").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))} | dict(
        SBATCH="echo sbatch", PYTHON=str(tmp_path / "python"), SETTINGS="/dev/null/none", SHARDS="3", DEVICE="cpu")
    line = ["bash", "slurm/find.sh", "--profile", "paper", "--set", "data=videos"]
    job = dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT))
    for more in ({}, job | dict(STEP="videos", SLURM_ARRAY_TASK_ID="1"), job | dict(STEP="join")):
        p = subprocess.run(line, cwd=ROOT, env=env | more, capture_output=True, text=True, timeout=60)
        assert p.returncode == 0, p.stderr
        if not more: assert all(w in p.stdout for w in ("--array=0-2", "--dependency=afterok:", "STEP=join", "find.sh"))
    said = "--profile paper --set data=videos"
    assert (tmp_path / "called").read_text().splitlines() == [
        f"-m cion_nb find --check {said}", f"-m cion_nb find {said} --shard 1/3", f"-m cion_nb find {said}"]

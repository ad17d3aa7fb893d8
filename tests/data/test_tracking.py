"""Tracking: tables that match their crops, folders that are read and not made again, kills, many videos."""
import json
import os
import signal
import time

import forked
import numpy as np
import pandas as pd
import pytest
from places import ROOT, TESTS
from street import ColourDetector, COLOURS, H, N, OPTIONS, W, write_street

from cion_nb.core.samples import as_samples, read_samples
from cion_nb.data import tracking as T
from cion_nb.data.tracking_scores import match_truth, tracking_scores

pytest.importorskip("trackers", reason="needs the extra [track]")


def content(out):
    "Everything that counts in a finished folder."
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted((out / "crops").rglob("*.jpg"))}


# ---------------------------------------------------------------- the chain

@pytest.mark.slow("tracks whole videos")
@pytest.mark.parametrize("tracker", list(T.TRACKERS))
def test_every_tracker_follows_the_rectangles(street, tmp_path, tracker):
    samples = T.track(street[0], tmp_path, ColourDetector(), tracker, min_height=20)
    scores = tracking_scores(samples, street[1])
    assert scores["IDF1"] > 0.9 and scores["MOTA"] > 0.85 and scores["people"] == 4
    person = match_truth(samples, street[1])
    assert (person > 0).mean() > 0.98
    assert pd.Series(person).groupby(samples["tracklet"].to_numpy()).nunique().max() <= 2


def test_table_is_valid_and_matches_its_crops(street, tmp_path):
    samples = T.track(street[0], tmp_path, camid=3, video_name="a b/c", first_tracklet=100, **OPTIONS)
    pd.testing.assert_frame_equal(samples, as_samples(samples))
    pd.testing.assert_frame_equal(samples, read_samples(tmp_path / "samples.parquet"))
    assert list(samples.columns[-5:]) == list(T.BOX_COLUMNS) and samples["pid"].eq(-1).all()
    assert samples["camid"].eq(3).all() and samples["video"].eq("a b/c").all()
    ids = samples["tracklet"].unique()
    assert sorted(ids) == list(range(100, 100 + len(ids)))
    assert not samples.duplicated(["tracklet", "frame"]).any() and samples["path"].is_unique
    assert samples[["tracklet", "frame"]].apply(tuple, axis=1).is_monotonic_increasing
    for row in samples.iloc[::37].itertuples():
        assert T.open_image(tmp_path / row.path).size == (row.w, row.h)
    inside = (samples[["x", "y"]] >= 0).all(axis=None) and (samples["x"] + samples["w"] <= W).all() and (
        samples["y"] + samples["h"] <= H).all()
    assert inside and samples["h"].min() >= 20


def test_crops_show_what_the_box_says(street, tmp_path):
    samples = T.track(street[0], tmp_path, **OPTIONS)
    person = match_truth(samples, street[1])
    for p in range(1, 5):
        row = samples[person == p].iloc[len(samples[person == p]) // 2]
        middle = np.asarray(T.open_image(tmp_path / row["path"]))[10:-10, 6:-6].mean((0, 1))[::-1]
        assert np.abs(middle - COLOURS[p - 1]).max() < 25


@pytest.mark.slow("tracks whole videos")
@pytest.mark.parametrize("stride", [1, 2, 7])
def test_stride_keeps_the_file_s_frame_numbers(street, tmp_path, stride):
    samples = T.track(street[0], tmp_path, stride=stride, **OPTIONS)
    assert (samples["frame"] % stride == 0).all() and samples["frame"].max() > N - 3 * stride - 1
    scores = tracking_scores(samples, street[1], frames=range(0, N, stride))
    assert scores["IDF1"] > (0.9 if stride < 7 else 0.4) and scores["precision"] > 0.95
    report = json.loads((tmp_path / "tracking.json").read_text())
    assert report["counts"]["frames"] == -(-N // stride) and report["video"]["read"] == N


@pytest.mark.parametrize("bad, message", [
    (dict(stride=0), "stride must be a whole number, 1 or more, got 0"), (dict(stride=1.5), "stride"),
    (dict(crop_quality=101), "crop_quality must be a whole number, from 0 to 100"),
    (dict(crop_quality="high"), "crop_quality"),
    (dict(min_height=-1), "min_height"), (dict(min_width="x"), "min_width"),
    (dict(min_score=float("nan")), "min_score"),
    (dict(frame_rate=0), "frame_rate"), (dict(tracker_settings=3), "tracker_settings"), (dict(resume="no"), "resume"),
    (dict(camid=-2), "camid"), (dict(first_tracklet=-1), "first_tracklet"),
])
def test_settings_without_meaning_are_refused_before_anything_is_written(street, tmp_path, bad, message):
    with pytest.raises(ValueError, match=message): T.track(street[0], tmp_path / "a", **OPTIONS | bad)
    assert not (tmp_path / "a").exists()
    if set(bad) & {"camid", "first_tracklet"}: return                        # of one video
    with pytest.raises(ValueError, match=message): T.track_videos([street[0]], tmp_path / "b", **OPTIONS | bad)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow("tracks whole videos")
def test_size_and_score_limits(street, tmp_path):
    tall = T.track(street[0], tmp_path / "a", ColourDetector(), min_height=50)
    assert len(tall) and tall["h"].min() >= 50
    wide = T.track(street[0], tmp_path / "b", ColourDetector(), min_height=20, min_width=23)
    assert wide["w"].min() >= 23
    with pytest.raises(T.NothingLeft, match="all 3.. detections are below min_score=0.95 .the best has 0.9"):
        T.track(street[0], tmp_path / "c", ColourDetector(), min_score=0.95)
    with pytest.raises(T.NothingLeft, match="lower than min_height=500"):
        T.track(street[0], tmp_path / "c", ColourDetector(), min_height=500)
    assert not (tmp_path / "c/samples.parquet").exists()
    counts = json.loads((tmp_path / "a/tracking.json").read_text())["counts"]
    assert counts["crops"] == len(tall) and counts["tracked"] == len(tall) + counts["too_small"]


# ---------------------------------------------------------------- resuming

def test_a_finished_folder_is_read_not_made_again(street, tmp_path):
    first, detector = T.track(street[0], tmp_path, **OPTIONS), ColourDetector()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}
    again = T.track(street[0], tmp_path, **{**OPTIONS, "detector": detector})
    pd.testing.assert_frame_equal(first, again)
    assert detector.calls == 0 and before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}


def test_a_lost_crop_comes_back(street, tmp_path):
    first = T.track(street[0], tmp_path, **OPTIONS)
    wanted = content(tmp_path)
    for p in first["path"][5:9]: (tmp_path / p).unlink()
    pd.testing.assert_frame_equal(first, T.track(street[0], tmp_path, **OPTIONS))
    assert content(tmp_path) == wanted


@pytest.mark.slow("tracks whole videos")
def test_other_settings_replace_the_crops_and_reuse_the_detections(street, tmp_path):
    T.track(street[0], tmp_path, **OPTIONS)
    detector = ColourDetector()
    other = T.track(street[0], tmp_path, detector, "ocsort", min_height=50)
    assert detector.calls == 0 and set(content(tmp_path)) == set(other["path"])
    fresh = T.track(street[0], tmp_path, detector, "ocsort", min_height=50, resume=False)
    assert detector.calls == N
    pd.testing.assert_frame_equal(other, fresh)


@pytest.mark.slow("tracks whole videos")
def test_another_video_in_the_same_folder_is_refused(street, tmp_path):
    T.track(street[0], tmp_path / "out", **OPTIONS)
    write_street(tmp_path / "other.avi", n=20, seed=1)
    with pytest.raises(ValueError, match="another video"): T.track(tmp_path / "other.avi", tmp_path / "out", **OPTIONS)
    assert T.track(tmp_path / "other.avi", tmp_path / "out", resume=False, **OPTIONS)["video"].eq("other").all()


def test_a_foreign_crops_folder_is_not_touched(street, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not written by"): T.track(street[0], tmp_path, **OPTIONS)
    assert (tmp_path / "crops/mine.txt").read_text() == "mine"


def test_two_processes_do_not_share_a_folder(street, tmp_path):
    from filelock import FileLock
    with FileLock(tmp_path / ".lock"), pytest.raises(RuntimeError, match="another process"):
        T.track(street[0], tmp_path, **OPTIONS)


CHILD = """
import sys, time
sys.path.insert(0, {tests!r}); sys.path.insert(0, {root!r})
import street as t
from cion_nb.data import tracking as T
detect = t.ColourDetector(pause={detect_pause})
if {crop_pause}:
    write = T._write_crop
    T._write_crop = lambda *a: (time.sleep({crop_pause}), write(*a))
T.track({video!r}, {out!r}, detect, "bytetrack", min_height=20)
"""


def run_and_kill(video, out, when, detect_pause=0.0, crop_pause=0.0):
    "Track in a process of its own and SIGKILL it as soon as `when()` holds."
    code = CHILD.format(tests=str(TESTS), root=str(ROOT), video=str(video), out=str(out), detect_pause=detect_pause,
                        crop_pause=crop_pause)
    child = forked.start(["-c", code], env=os.environ | dict(CION_NB_PROGRESS="0", OMP_NUM_THREADS="1"))
    end = time.time() + 60
    while not when() and child.poll() is None and time.time() < end: time.sleep(0.005)
    assert child.poll() is None, "the child ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.wait()


@pytest.mark.slow("starts processes")
def test_survives_sigkill_while_detecting_and_while_cutting(tmp_path):
    video, out, whole = tmp_path / "long.avi", tmp_path / "out", tmp_path / "whole"
    write_street(video, n=150)
    wanted = T.track(video, whole, **OPTIONS)
    run_and_kill(video, out, lambda: len(list(out.rglob("0*.npz"))) >= 1, detect_pause=0.02)
    assert not (out / "samples.parquet").exists()
    assert 1 <= len(list(out.rglob("0*.npz"))) < 3
    run_and_kill(video, out, lambda: len(list(out.rglob("*.jpg"))) >= 30, crop_pause=0.01)
    n_crops = len(list(out.rglob("*.jpg")))
    assert 30 <= n_crops < len(wanted) and not (out / "samples.parquet").exists()
    detector = ColourDetector()
    got = T.track(video, out, **{**OPTIONS, "detector": detector})
    pd.testing.assert_frame_equal(got, wanted)
    assert content(out) == content(whole) and detector.calls == 0
    assert json.loads((out / "tracking.json").read_text())["counts"]["crops_written"] <= len(wanted) - n_crops + 1


def test_a_damaged_block_is_detected_again(street, tmp_path):
    first = T.track(street[0], tmp_path, **OPTIONS)
    block = sorted(tmp_path.rglob("000001.npz"))[0]
    block.write_bytes(block.read_bytes()[:100])
    (tmp_path / "samples.parquet").unlink()
    detector = ColourDetector()
    pd.testing.assert_frame_equal(first, T.track(street[0], tmp_path, **{**OPTIONS, "detector": detector}))
    assert detector.calls == N - 64


# ---------------------------------------------------------------- many videos

def test_many_videos_share_no_tracklet(street, tmp_path):
    write_street(tmp_path / "second.avi", n=40, seed=2)
    write_street(tmp_path / "empty.avi", n=5, people=0)
    (tmp_path / "bad.avi").write_bytes(b"no")
    videos = [street[0], tmp_path / "second.avi", tmp_path / "empty.avi", tmp_path / "bad.avi"]
    with pytest.raises(T.UnreadableVideo): T.track_videos(videos, tmp_path / "out", **OPTIONS)
    with pytest.warns(UserWarning, match="skipped"):
        samples = T.track_videos(videos, tmp_path / "out", camids=[4, 5, 6, 7], on_unreadable="skip", **OPTIONS)
    assert set(samples["video"]) == {"street", "second"} and samples.groupby("tracklet")["video"].nunique().max() == 1
    assert samples.groupby("video")["camid"].first().to_dict() == dict(street=4, second=5)
    assert all((tmp_path / "out" / p).exists() for p in samples["path"])
    pd.testing.assert_frame_equal(samples, read_samples(tmp_path / "out/samples.parquet"))
    with pytest.raises(ValueError, match="3 camids for 4 videos"):
        T.track_videos(videos, tmp_path / "out", camids=[1, 2, 3], **OPTIONS)
    with pytest.raises(ValueError, match="pass a list"): T.track_videos(str(street[0]), tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match="dict name"): T.track_videos([street[0], street[0]], tmp_path / "o", **OPTIONS)
    assert len(T.track_videos([], tmp_path / "none", **OPTIONS)) == 0


def test_crops_are_a_tracklet_folder(street, tmp_path):
    from cion_nb.core.samples import read_tracklets
    samples = T.track(street[0], tmp_path, **OPTIONS)
    again = read_tracklets(tmp_path / "crops")
    assert ("crops/" + again["path"]).tolist() == samples["path"].tolist()
    assert (again[["tracklet", "frame"]].to_numpy() == samples[["tracklet", "frame"]].to_numpy()).all()
    assert (again["video"] == samples["video"]).all()


# ---------------------------------------------------------------- tracks that are known

def mot(truth, path):
    "A truth with frames from 0 as a MOT file."
    truth.assign(frame=truth["frame"] + 1).to_csv(path, header=False, index=False)
    return path


def test_known_tracks_are_cut_as_they_are(street, tmp_path):
    truth = street[1]
    samples = T.cut_tracks(street[0], tmp_path / "out", mot(truth, tmp_path / "gt.txt"), are_people=True,
                           min_height=20, camid=2)
    pd.testing.assert_frame_equal(samples, as_samples(samples))
    pd.testing.assert_frame_equal(samples, read_samples(tmp_path / "out/samples.parquet"))
    inside = (truth["x"] + truth["w"]).clip(upper=W) - truth["x"].clip(lower=0)
    wide = truth[inside >= 12]
    assert len(samples) == len(wide) and samples["camid"].eq(2).all()
    assert samples.groupby("pid").size().to_dict() == wide.groupby("id").size().to_dict()
    assert sorted(samples["tracklet"].unique()) == [0, 1, 2, 3]
    assert samples.groupby("tracklet")["pid"].nunique().eq(1).all()
    for p in range(1, 5):
        row = samples[samples["pid"] == p].iloc[20]
        middle = np.asarray(T.open_image(tmp_path / "out" / row["path"]))[10:-10, 6:-6].mean((0, 1))[::-1]
        assert np.abs(middle - COLOURS[p - 1]).max() < 25


def test_known_tracks_of_somebody_else_name_nobody_and_leave_out_what_is_flagged(street, tmp_path):
    truth = street[1].assign(score=np.where(street[1]["id"] == 2, 0, 1))
    samples = T.cut_tracks(street[0], tmp_path / "out", mot(truth, tmp_path / "result.txt"), min_height=20, stride=5)
    assert samples["pid"].eq(-1).all() and samples["tracklet"].nunique() == 3 and (samples["frame"] % 5 == 0).all()
    assert samples.attrs["counts"]["below_score"] == (truth["id"] == 2).sum()
    before = {p: (tmp_path / "out" / p).stat().st_mtime_ns for p in samples["path"]}
    assert T.cut_tracks(street[0], tmp_path / "out", tmp_path / "result.txt", min_height=20, stride=5).equals(samples)
    assert before == {p: (tmp_path / "out" / p).stat().st_mtime_ns for p in samples["path"]}


@pytest.mark.parametrize("change, message", [
    (lambda t: t.assign(id=-1), "has no id: these are detections"),
    (lambda t: t.assign(id=t["id"].replace(2, 1)), "has an id that stands in this frame before"),
    (lambda t: t.assign(x=t["x"] + 2 * W), "lie outside of the picture"),
    (lambda t: t.assign(frame=t["frame"] + N), "lie in frames that .* lacks"),
], ids=["no ids", "twice", "another resolution", "another video"])
def test_tracks_that_do_not_fit_are_refused(street, tmp_path, change, message):
    file = mot(change(street[1]), tmp_path / "gt.txt")
    with pytest.raises(ValueError, match=message):
        T.cut_tracks(street[0], tmp_path / "out", file, min_height=20)
    assert not (tmp_path / "out/samples.parquet").exists()

"""Detectors that embed: cached vectors, a tracker that goes by them, stores of features without extraction."""
import json
import os
import signal
import time

import forked
import numpy as np
import pandas as pd
import pytest
from places import ROOT, TESTS
from street import ColourDetector, H, LOOK, N, OPTIONS, Seeing, W, write_street

from cion_nb.core.files import fingerprint
from cion_nb.core.samples import read_samples
from cion_nb.core.store import read_features
from cion_nb.data import tracking as T
from cion_nb.data.tracking_scores import match_truth, tracking_scores
from cion_nb.data.videos import Video
from cion_nb.identities.denoise import denoise

pytest.importorskip("trackers", reason="needs the extra [track]")


def npz(cache): return {p.name: p.read_bytes() for p in sorted(cache.rglob("*.npz"))}


# ---------------------------------------------------------------- detections and their cache

def test_vectors_come_with_their_boxes_and_from_the_cache_to_the_bit(street, tmp_path):
    detector = Seeing()
    boxes, held, looks = T.detect(street[0], detector, tmp_path)
    assert held == N and looks.shape == (len(boxes), 6) and looks.dtype == np.float32
    frames = [picture() for n, picture in Video(street[0]).frames() if n < 3]
    want = [look for _, _, look in detector.detect(frames)]
    assert np.array_equal(looks[boxes["frame"] < 3], np.float32(np.concatenate(want)))
    detector.calls = 0
    again = T.detect(street[0], detector, tmp_path)
    assert detector.calls == 0 and again[0].equals(boxes) and np.array_equal(again[2], looks)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_resumed_detection_has_the_vectors_of_an_unbroken_one(street, tmp_path, kept):
    _, _, want = T.detect(street[0], Seeing(), tmp_path / "whole")
    whole = npz(tmp_path / "whole")
    T.detect(street[0], Seeing(), tmp_path / "broken")
    for file in sorted((tmp_path / "broken").rglob("*.npz"))[kept:]: file.unlink()
    _, _, got = T.detect(street[0], Seeing(), tmp_path / "broken")
    assert np.array_equal(got, want) and npz(tmp_path / "broken") == whole


def test_blocks_of_detectors_without_vectors_are_what_they_were(street, tmp_path):
    "Folder and file, to the byte: `np.savez` of these six arrays."
    out = T.detect(street[0], ColourDetector(), tmp_path)
    assert len(out) == 2
    name = fingerprint([Video(street[0]).content, dict(detector="colour"), 1, 64])
    assert [p.name for p in tmp_path.iterdir()] == [name]
    (tmp_path / "old").mkdir()
    boxes, file = out[0][out[0]["frame"] < 64], tmp_path / "old/000000.npz"
    np.savez(file, frame=boxes["frame"].to_numpy(np.int64), box=np.ascontiguousarray(boxes.iloc[:, 1:5], np.float32),
             score=boxes["score"].to_numpy(np.float32), end=np.int64(-1), next=np.int64(64), not_finite=np.int64(0))
    assert file.read_bytes() == (tmp_path / name / "000000.npz").read_bytes()


def test_another_width_than_the_cache_s_is_named(street, tmp_path):
    T.detect(street[0], Seeing(6), tmp_path)
    with pytest.raises(ValueError, match="embeddings of width 6, and the detector's are of width 8: its `settings`"):
        T.detect(street[0], Seeing(8), tmp_path)


def test_a_cache_of_the_same_settings_without_vectors_is_detected_again(street, tmp_path):
    plain, detector = ColourDetector(), Seeing()
    plain.settings = detector.settings
    T.detect(street[0], plain, tmp_path)
    assert T.detect(street[0], detector, tmp_path)[2].shape[1] == 6 and detector.calls == N


class Odd:
    "What a frame gets is said from outside."
    settings = dict(detector="odd")
    def __init__(self, answer, embed_dim=3):
        self.answer = answer
        if embed_dim: self.embed_dim = embed_dim
    def detect(self, frames): return [self.answer for _ in frames]


TWO = np.array([[10, 20, 40, 90], [100, 20, 130, 90.]])


def test_vectors_that_are_not_finite_take_their_boxes_along_and_are_counted(street, tmp_path):
    bad = Odd((TWO.repeat(2, 0), np.full(4, .9), np.array([[1, 0, 0], [0, np.nan, 1], [np.inf, 0, 0], [0, 0, 0]])))
    boxes, _, looks = T.detect(street[0], bad, tmp_path)
    assert boxes.attrs["not_finite"] == 3 * N and len(boxes) == len(looks) == N and (looks == [1, 0, 0]).all()
    with pytest.warns(UserWarning, match=f"{3 * N} boxes of the detector are not finite"):
        samples = T.track(street[0], tmp_path / "out", bad, "embedding")
    assert samples.attrs["counts"]["not_finite"] == 3 * N and samples["tracklet"].nunique() == 1


@pytest.mark.parametrize("answer, dim, message", [
    ((TWO, [.9, .9]), 3, r"must return for each frame boxes \(n, 4\), scores \(n,\) and embeddings \(n, 3\)"),
    ((TWO, [.9, .9], np.ones((2, 4))), 3, r"\(2, 4\)\)\].*embeddings \(n, 3\)"),
    ((TWO, [.9, .9], np.ones((1, 3))), 3, r"embeddings \(n, 3\)"),
    ((TWO, [.9, .9], np.ones((2, 3))), None, "a detector that embeds says how wide as `embed_dim`"),
])
def test_answers_that_do_not_fit(street, tmp_path, answer, dim, message):
    with pytest.raises(ValueError, match=message): T.detect(street[0], Odd(answer, dim), tmp_path)


def test_frames_without_boxes(street, tmp_path):
    boxes, _, looks = T.detect(street[0], Odd(([], [], [])), tmp_path / "none")
    assert len(boxes) == 0 and looks.shape == (0, 3)
    samples = T.track(street[0], tmp_path / "out", Odd(([], [], [])), "embedding", features=True)
    assert len(samples) == 0 and read_features(tmp_path / "out/features").x.shape == (0, 3)


# ---------------------------------------------------------------- tracking by looks

def test_the_tracker_gets_the_vectors_of_its_boxes(street, tmp_path):
    samples = T.track(street[0], tmp_path / "a", **LOOK)
    scores = tracking_scores(samples, street[1])
    assert scores["IDF1"] > .95 and scores["switches"] == 0 and samples["tracklet"].nunique() == 4

    class Shuffled(Seeing):
        "Vectors of somebody else in every other frame."
        def _one(self, frame):
            boxes, score, looks = super()._one(frame)
            return boxes, score, looks[::-1 if int(frame[:9].sum()) % 2 else 1]

    spoilt = T.track(street[0], tmp_path / "b", **{**LOOK, "detector": Shuffled()}, tracker_settings=dict(overlap=0.))
    assert tracking_scores(spoilt, street[1])["IDF1"] < .9
    plain = T.track(street[0], tmp_path / "c", ColourDetector(), "embedding", min_height=20,
                    tracker_settings=dict(appearance=0))
    assert tracking_scores(plain, street[1])["IDF1"] > .9


def test_a_score_filter_leaves_vectors_with_their_boxes(street, tmp_path):
    class Scored(Seeing):
        "The first box of a frame has no score to speak of."
        def _one(self, frame):
            boxes, scores, looks = super()._one(frame)
            scores[:1] = .05
            return boxes, scores, looks

    T.track(street[0], tmp_path, Scored(), "embedding", min_height=20, min_score=.5, features=True)
    samples, store = read_samples(tmp_path / "samples.parquet"), read_features(tmp_path / "features")
    crops = [np.asarray(T.open_image(tmp_path / p))[10:-10, 6:-6] for p in samples["path"]]
    want = (np.array([crop.mean((0, 1))[::-1] for crop in crops]) - 110) / 60
    cosine = (store.x[:, :3] * want).sum(1) / np.linalg.norm(want, axis=1)
    assert len(store) == len(samples) and cosine.min() > .9


@pytest.mark.parametrize("asked, message", [
    (dict(tracker="embedding"), r'tracker "embedding" goes by embeddings, and ColourDetector gives none: wrap it, '
                                r"EmbeddedDetector\(detector, model\)"),
    (dict(features=True), "features=True keeps the detector's embeddings, and ColourDetector gives none: wrap it"),
    (dict(features=1), "features must be true or false"),
])
def test_a_detector_without_vectors_is_refused_before_anything_is_detected(street, tmp_path, asked, message):
    detector = ColourDetector()
    for track in (lambda: T.track(street[0], tmp_path / "a", **{**OPTIONS, "detector": detector} | asked),
                  lambda: T.track_videos([street[0]], tmp_path / "b", **{**OPTIONS, "detector": detector} | asked)):
        with pytest.raises(ValueError, match=message): track()
    assert detector.calls == 0 and not (tmp_path / "a").exists()


# ---------------------------------------------------------------- features without extraction

def test_row_i_of_the_store_is_row_i_of_the_table(street, tmp_path):
    samples = T.track(street[0], tmp_path, features=True, **LOOK)
    store = read_features(tmp_path / "features")
    assert store.samples.equals(samples) and store.samples.equals(read_samples(tmp_path / "samples.parquet"))
    boxes, _, looks = T.detect(street[0], LOOK["detector"], tmp_path / "detections")
    key = dict(zip(zip(boxes["frame"], boxes["left"].clip(0).astype(int), boxes["top"].astype(int)), looks))
    want = np.array([key[f, int(x), int(y)] for f, x, y in zip(samples["frame"], samples["x"], samples["y"])])
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(store.x, want, atol=1e-3)
    assert store.x.dtype == np.float16 and store.request["made_by"] == "track" and len(store.unreadable) == 0
    labels, person = denoise(store.x, store.samples).labels, match_truth(samples, street[1])
    known = labels >= 0
    assert len(labels) == len(samples) and known.mean() > .9
    assert pd.Series(person[known]).groupby(labels[known]).nunique().max() == 1


def test_a_store_is_added_to_a_finished_folder_and_read_from_it(street, tmp_path):
    first, detector = T.track(street[0], tmp_path, **LOOK), Seeing()
    assert not (tmp_path / "features").exists()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}
    more = {**LOOK, "detector": detector}
    assert T.track(street[0], tmp_path, features=True, **more).equals(first) and detector.calls == 0
    made = (tmp_path / "features/features.json").stat().st_mtime_ns
    T.track(street[0], tmp_path, features=True, **more)
    T.track(street[0], tmp_path, **more)                                    # not asked for, and left where it is
    assert (tmp_path / "features/features.json").stat().st_mtime_ns == made
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}
    T.track(street[0], tmp_path, **{**more, "min_height": 50})              # other crops: that store is not theirs
    assert not (tmp_path / "features").exists() and detector.calls == 0


def test_a_store_of_extract_is_not_touched(street, tmp_path):
    (tmp_path / "features").mkdir()
    (tmp_path / "features/features.json").write_text('{"model": "mine"}')
    with pytest.raises(FileExistsError, match="holds features that `extract` made"):
        T.track(street[0], tmp_path, features=True, **LOOK)
    T.track(street[0], tmp_path, **LOOK)
    T.track(street[0], tmp_path, **{**LOOK, "min_height": 50})
    assert json.loads((tmp_path / "features/features.json").read_text()) == {"model": "mine"}


CHILD = """
import sys, time
sys.path.insert(0, {tests!r}); sys.path.insert(0, {root!r})
import street as t
from cion_nb.core import store
from cion_nb.data.tracking import track
write = store.write_samples
def slow(samples, path):
    if "features" in str(path): time.sleep(30)
    write(samples, path)
store.write_samples = slow
track({video!r}, {out!r}, features=True, **t.LOOK)
"""


@pytest.mark.slow("starts a process")
def test_survives_sigkill_while_the_store_is_written(street, tmp_path):
    wanted, out = T.track(street[0], tmp_path / "whole", features=True, **LOOK), tmp_path / "out"
    code = CHILD.format(tests=str(TESTS), root=str(ROOT), video=str(street[0]), out=str(out))
    child = forked.start(["-c", code], env=os.environ | dict(CION_NB_PROGRESS="0", OMP_NUM_THREADS="1"))
    end = time.time() + 60
    while not (out / "features/features.npy").exists() and child.poll() is None and time.time() < end: time.sleep(.005)
    assert child.poll() is None, "the child ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(FileNotFoundError, match="holds no features"): read_features(out / "features")
    detector = Seeing()
    assert T.track(street[0], out, features=True, **{**LOOK, "detector": detector}).equals(wanted)
    assert np.array_equal(read_features(out / "features").x, read_features(tmp_path / "whole/features").x)
    assert detector.calls == 0


def test_stores_of_many_videos_are_joined(street, tmp_path):
    write_street(tmp_path / "second.avi", n=40, seed=2)
    write_street(tmp_path / "empty.avi", n=5, people=0)
    videos = [tmp_path / "second.avi", tmp_path / "empty.avi", street[0]]
    halves = [T.track_videos(videos, tmp_path / "out", shard=(i, 2), features=True, **LOOK) for i in range(2)]
    assert not (tmp_path / "out/features").exists() and sum(map(len, halves)) > 0
    detector = Seeing()
    samples = T.track_videos(videos, tmp_path / "out", features=True, **{**LOOK, "detector": detector})
    store = read_features(tmp_path / "out/features")
    assert detector.calls == 0 and store.samples.equals(samples)
    for name in ("second", "street"):
        own = read_features(tmp_path / "out" / name / "features")
        assert np.array_equal(store.x[(samples["video"] == name).to_numpy()], own.x)
    assert read_features(tmp_path / "out/empty/features").x.shape == (0, 6)
    assert T.track_videos(videos, tmp_path / "out", **LOOK).equals(samples)


def test_a_tracker_object_is_told_by_its_settings(street, tmp_path):
    from cion_nb.data.association import EmbeddingTracker
    tracker = EmbeddingTracker(15.)
    first = T.track(street[0], tmp_path, **{**LOOK, "tracker": tracker})
    made = (tmp_path / "tracking.json").stat().st_mtime_ns
    T.track(street[0], tmp_path, **{**LOOK, "tracker": tracker})            # one that was used is the same tracker
    assert (tmp_path / "tracking.json").stat().st_mtime_ns == made
    other = T.track(street[0], tmp_path, **{**LOOK, "tracker": EmbeddingTracker(15., keep=.5)})
    assert (tmp_path / "tracking.json").stat().st_mtime_ns > made and len(other) == len(first)


def test_a_detector_of_numbers_gets_frames_and_numbers(street, tmp_path):
    class Both:
        embed_dim, uses_frames, uses_numbers, settings = 2, False, True, dict(detector="both")
        def detect(self, frames, numbers):
            assert all(f.shape == (H, W, 3) for f in frames) and len(frames) == len(numbers)
            return [(TWO, np.full(2, .9), np.array([[1, n], [n, 1.]]) + 1) for n in numbers]
    boxes, _, looks = T.detect(street[0], Both(), tmp_path, stride=3)
    assert np.array_equal(looks[::2, 1], boxes["frame"][::2] + 1) and set(boxes["frame"]) == set(range(0, N, 3))

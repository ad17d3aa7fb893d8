"""Scores over several videos in one space of identities: cases by hand, what leaves, refusals."""
import sys

import numpy as np
import pandas as pd
import pytest
from examples import three_people

from cion_nb.data.detectors import MOT_COLUMNS
from cion_nb.data.tracking_scores import identity_space_scores, tracking_scores

pytest.importorskip("reid_hota", reason="needs the extra [reid]")


def walk(person, frames=range(10), x=0., cls=-1, flag=1):
    "One person who walks: rows of a truth."
    return pd.DataFrame([(f, person, x + 3 * f, 50, 40, 100, flag, cls, 1.) for f in frames], columns=list(MOT_COLUMNS))


def result(truths, name=lambda video, person: person):
    "A perfect result, its identities by video and person."
    parts = [t.assign(video=v, tracklet=[name(v, p) for p in t["id"]]) for v, t in truths.items()]
    return pd.concat(parts, ignore_index=True)[["video", "frame", "tracklet", "x", "y", "w", "h", "score"]]


TWO = dict(day=pd.concat([walk(1), walk(2, x=300.)]), night=pd.concat([walk(1, x=100.), walk(3, x=500.)]))


def test_perfect_is_1():
    scores = identity_space_scores(result(TWO), TWO)
    for name in ("HOTA", "DetA", "AssA", "IDF1"): assert scores[name] == pytest.approx(1), name
    counts = {k: scores[k] for k in ("people", "identities", "people_boxes", "identities_boxes", "boxes_left_out",
                                     "boxes_twice")}
    assert counts == dict(people=3, identities=3, people_boxes=40, identities_boxes=40, boxes_left_out=0, boxes_twice=0)


def test_one_person_under_two_ids_in_two_videos_by_hand():
    """Person 1 is 7 in one video and 8 in the other, 10 boxes each: 10 are found under her best name (TP), 10 missed,
    10 named wrongly. DetA 10/30, AssA 10/20, IDF1 10/20; no video alone sees it."""
    truths = dict(day=walk(1), night=walk(1))
    split = result(truths, lambda video, person: dict(day=7, night=8)[video])
    scores = identity_space_scores(split, truths)
    assert scores["DetA"] == pytest.approx(1 / 3) and scores["AssA"] == scores["IDF1"] == pytest.approx(1 / 2)
    assert scores["HOTA"] == pytest.approx(np.sqrt(1 / 6))
    for video in truths: assert tracking_scores(split[split["video"] == video], truths[video])["HOTA"] == 1


def test_two_people_under_one_name_by_hand():
    "9 boxes of one and 3 of another share a name: the first is found, the other is not. TP 9, FN 3, FP 3."
    truths = dict(day=walk(1, range(9)), night=walk(2, range(3)))
    scores = identity_space_scores(result(truths, lambda video, person: 5), truths)
    assert scores["DetA"] == pytest.approx(9 / 15) and scores["AssA"] == pytest.approx(9 / 12)
    assert scores["IDF1"] == pytest.approx(9 / 12)


def test_labels_are_a_column_or_an_array_and_nobody_is_left_out():
    samples = result(TWO)
    labels = samples["tracklet"].to_numpy().copy()
    assert identity_space_scores(samples, TWO, labels) == identity_space_scores(samples.assign(who=labels), TWO, "who")
    labels[:5] = -1
    scores = identity_space_scores(samples, TWO, labels)
    assert scores["boxes_left_out"] == 5 and scores["DetA"] == pytest.approx(35 / 40)
    nobody = identity_space_scores(samples, TWO, np.full(len(samples), -1))
    assert nobody["HOTA"] == 0 and nobody["identities"] == 0
    with pytest.raises(ValueError, match="3 labels for 40 rows"): identity_space_scores(samples, TWO, [1, 2, 3])


def test_a_label_twice_in_a_frame_counts_once_and_is_told():
    truths = dict(day=pd.concat([walk(1), walk(2, x=300.)]))
    merged = identity_space_scores(result(truths, lambda video, person: 5), truths)
    assert merged["boxes_twice"] == 10 and merged["HOTA"] < .6


def test_missed_videos_and_frames():
    samples = result(TWO)
    part = identity_space_scores(samples[samples["video"] == "day"], TWO)
    assert part["people_boxes"] == 40 and part["DetA"] == pytest.approx(1 / 2)
    some = identity_space_scores(samples, TWO, frames=dict(day=range(0, 10, 2), night=range(5)))
    assert some["people_boxes"] == 20 and some["HOTA"] == pytest.approx(1)
    with pytest.raises(ValueError, match="no truth for night; truths are of day"):
        identity_space_scores(samples, dict(day=TWO["day"]))


def test_what_a_benchmark_ignores_is_ignored():
    "A statue's box, a box on it, and a person with flag 0."
    truth = pd.concat([walk(1, cls=1), walk(2, x=300., cls=7), walk(3, x=600., cls=1, flag=0)])
    scores = identity_space_scores(result(dict(day=truth)).query("tracklet != 3"), dict(day=truth), benchmark="MOT17")
    assert scores["HOTA"] == pytest.approx(1) and scores["people"] == scores["identities"] == 1


def test_detections_are_what_a_loop_counts():
    "Boxes that are off by some pixels, over thresholds of overlap: TP, FN and FP by a loop."
    rng, truths = np.random.default_rng(0), dict(a=three_people(), b=three_people())
    samples = result(truths)
    samples["x"] += rng.normal(0, 6, len(samples))
    scores, det = identity_space_scores(samples, truths), []
    true = pd.concat([t.assign(video=v) for v, t in truths.items()]).reset_index(drop=True)
    both = true.merge(samples, left_on=["video", "frame", "id"], right_on=["video", "frame", "tracklet"])
    w = np.minimum(both.x_x + both.w_x, both.x_y + both.w_y) - np.maximum(both.x_x, both.x_y)
    overlap = (w.clip(lower=0) * both.h_x) / (2 * both.w_x * both.h_x - w.clip(lower=0) * both.h_x)
    for least in np.arange(.05, .99, .05):
        found = (overlap >= least - 1e-12).sum()
        det.append(found / (2 * len(true) - found))
    assert scores["DetA"] == pytest.approx(np.mean(det), abs=1e-9)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reid_hota", None)
    with pytest.raises(ImportError, match=r'pip install "cion_nb\[reid\]"'): identity_space_scores(result(TWO), TWO)

"""Tracking scores against the reference implementation, on files and tables that people have."""
import warnings

import numpy as np
import pandas as pd
import pytest
from examples import three_people, written
from hypothesis import given, settings as hsettings, strategies as st
from street import OPTIONS

from cion_nb.data import tracking as T, tracking_scores as scores_room
from cion_nb.data.detectors import MOT_COLUMNS
from cion_nb.data.tracking_scores import box_iou, match_truth, read_mot, tracking_scores, tracklets_to_mot

pytest.importorskip("trackers", reason="needs the extra [track]")

# ---------------------------------------------------------------- boxes and scores

boxes_ = st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 20)] * 2), max_size=6)


@given(boxes_, boxes_)
@hsettings(deadline=None, max_examples=60)
def test_iou_counts_pixels(a, b):
    def mask(box):
        m = np.zeros((60, 60), bool)
        x, y, w, h = box
        m[y:y + h, x:x + w] = True
        return m
    def ltrb(boxes): return np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], float).reshape(-1, 4)
    want = np.array([[(mask(p) & mask(q)).sum() / (mask(p) | mask(q)).sum() for q in b] for p in a]).reshape(
        len(a), len(b))
    np.testing.assert_allclose(box_iou(ltrb(a), ltrb(b)), want)


def random_mot(seed, classes):
    "Truth with flags and classes, and a noisy answer to it with wrong ids, misses and false boxes."
    rng, gt, mine = np.random.default_rng(seed), [], []
    for person in range(1, 9):
        kind = int(rng.choice([1, 1, 1, 7, 8, 12, 3])) if classes else -1
        x, y = rng.uniform(0, 400, 2)
        for f in range(rng.integers(0, 10), 30):
            x, y = x + rng.normal(3, 1), y + rng.normal(0, 1)
            gt.append((f, person, x, y, 40, 100, int(kind in (1, -1) and rng.random() > 0.1), kind, 1.0))
            if rng.random() < 0.85:
                mine.append((f, person + (100 if f > 15 and person % 3 == 0 else 0), x + rng.normal(0, 6),
                             y + rng.normal(0, 6), 40, 100, 0.9))
            if rng.random() < 0.1: mine.append((f, 1000 + person, *rng.uniform(0, 400, 2), 40, 100, 0.5))
    mine = pd.DataFrame(mine, columns=["frame", "tracklet", "x", "y", "w", "h", "score"]).drop_duplicates(
        ["frame", "tracklet"])
    return pd.DataFrame(gt, columns=list(MOT_COLUMNS)).round(2), mine.round(2).assign(video="v").sort_values(
        ["tracklet", "frame"], ignore_index=True)


@pytest.mark.slow("runs the reference's own scorer")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("benchmark", ["MOT15", "MOT17"])
def test_scores_equal_the_reference_run_from_files(tmp_path, seed, benchmark):
    import trackeval
    gt, mine = random_mot(seed, benchmark == "MOT17")
    folder = tmp_path / "gt" / "SEQ"
    (folder / "gt").mkdir(parents=True)
    (tmp_path / "res/ours/data").mkdir(parents=True)
    gt.assign(frame=gt["frame"] + 1).to_csv(folder / "gt/gt.txt", header=False, index=False)
    tracklets_to_mot(mine, tmp_path / "res/ours/data/SEQ.txt")
    (folder / "seqinfo.ini").write_text("[Sequence]\nname=SEQ\nseqLength=30\n")
    quiet = dict(PRINT_CONFIG=False)
    data = trackeval.datasets.MotChallenge2DBox(dict(GT_FOLDER=str(tmp_path / "gt"),
                                                     TRACKERS_FOLDER=str(tmp_path / "res"), BENCHMARK=benchmark,
                                                     SEQ_INFO={"SEQ": None}, SKIP_SPLIT_FOL=True, **quiet))
    evaluator = trackeval.Evaluator(dict(PRINT_RESULTS=False, OUTPUT_SUMMARY=False, OUTPUT_DETAILED=False,
                                         PLOT_CURVES=False, TIME_PROGRESS=False, LOG_ON_ERROR=None, BREAK_ON_ERROR=True,
                                         **quiet))
    result, _ = evaluator.evaluate([data], [trackeval.metrics.CLEAR(quiet), trackeval.metrics.Identity(quiet),
                                            trackeval.metrics.HOTA()])
    want = result["MotChallenge2DBox"]["ours"]["SEQ"]["pedestrian"]
    got = tracking_scores(mine, folder / "gt/gt.txt", frames=range(30), benchmark=benchmark)
    assert got["MOTA"] == pytest.approx(want["CLEAR"]["MOTA"], abs=1e-9) and got["switches"] == want["CLEAR"]["IDSW"]
    assert got["IDF1"] == pytest.approx(want["Identity"]["IDF1"], abs=1e-9)
    assert got["HOTA"] == pytest.approx(np.mean(want["HOTA"]["HOTA"]), abs=1e-6)


def test_perfect_and_empty_scores():
    gt, _ = random_mot(0, False)
    gt = gt.assign(score=1.0)
    perfect = gt.rename(columns=dict(id="tracklet")).assign(video="v")
    scores = tracking_scores(perfect, gt)
    assert scores["MOTA"] == scores["IDF1"] == 1 and scores["HOTA"] == pytest.approx(1)
    assert (match_truth(perfect, gt) == gt["id"]).all()
    with pytest.warns(UserWarning, match="truth holds no box"): nobody = tracking_scores(perfect, gt[:0])
    assert nobody["recall"] == 0 and nobody["truth_boxes"] == 0
    two = pd.concat([perfect, perfect.assign(video="w")])
    for score in (tracking_scores, match_truth):
        with pytest.raises(ValueError, match="one video"): score(two, gt)


# ---------------------------------------------------------------- files that people really have

def as_result(table):
    return table.rename(columns=dict(id="tracklet")).drop(columns=["class", "visibility"]).assign(video="v")


def test_one_id_twice_in_a_frame_is_refused_on_every_path(tmp_path):
    good = three_people()
    shared, doubled = three_people(ids=lambda i: 1 if i == 3 else i), pd.concat([good, good])
    for bad in (shared, doubled):
        file = written(tmp_path / "bad.txt", bad)
        for gt in (bad, file, str(file), read_mot(file)):
            with pytest.raises(ValueError, match="truth: id 1 .* in frame 1"): tracking_scores(as_result(good), gt)
            with pytest.raises(ValueError, match="truth: id 1 .* in frame 1"): match_truth(as_result(good), gt)
        for result in (as_result(bad), bad, file, read_mot(file)):
            with pytest.raises(ValueError, match="result: id 1 .* in frame 1"): tracking_scores(result, good)
        with pytest.raises(ValueError, match="id 1 .* in frame 1"): tracklets_to_mot(as_result(bad), tmp_path / "r.txt")
    late = pd.concat([good, good[good["frame"] == 17].assign(x=500)])
    with pytest.raises(ValueError, match="id 1 .* in frame 18 .*; 17 from 0"): tracking_scores(as_result(late), good)
    with pytest.raises(ValueError, match="id -1 .* detections"): tracking_scores(good.assign(id=-1), good)
    with pytest.raises(ValueError, match="id -1 .* detections"):
        tracking_scores(good, written(tmp_path / "det.txt", good.assign(id=-1)))


def test_the_reference_s_own_guard_stands_behind_ours(monkeypatch):
    import trackeval
    monkeypatch.setattr(scores_room, "_check_ids", lambda *a: None)
    good = three_people()
    with pytest.raises(trackeval.utils.TrackEvalException, match="same ID more than once"):
        tracking_scores(pd.concat([good, good]), good)


@pytest.mark.parametrize("cls,classes,boxes", [
    (lambda i: 2, 2, 90), (lambda i: 4, (4,), 90), (lambda i: 0, [0], 90), (lambda i: 1 if i == 1 else 2, (1, 2), 90),
    (lambda i: 1 if i == 1 else 6, (6,), 60)])
def test_class_numbers_of_another_tool_are_refused_until_named(tmp_path, cls, classes, boxes):
    gt, result = written(tmp_path / "gt.txt", three_people(cls)), as_result(three_people())
    for score in (tracking_scores, match_truth):
        with pytest.raises(ValueError, match=r"gt.txt: truth: classes .*boxes.*benchmark=.*classes="):
            score(result, gt)
    got = tracking_scores(result, gt, classes=classes)
    assert got["truth_boxes"] == boxes
    assert got["truth_left_out"] == 90 - boxes == sum(got.left_out["truth_of_class"].values())
    assert got["recall"] == 1 and (match_truth(result, gt, classes=classes) > 0).sum() == boxes
    every = tracking_scores(result, gt, benchmark="MOT15")
    assert every["MOTA"] == 1 and every["truth_left_out"] == 0


def test_benchmarks_differ_as_the_reference_says(tmp_path):
    gt, result = three_people(lambda i: 1 if i == 1 else 6, flag=lambda i: int(i == 1)), as_result(three_people())
    # MOT17 and MOT20 differ there
    with pytest.raises(ValueError, match="6 .60 boxes"): tracking_scores(result, gt)
    assert tracking_scores(result, gt, benchmark="MOT17")["MOTA"] == -1
    twenty = tracking_scores(result, gt, benchmark="mot-20")
    assert twenty["MOTA"] == 1 and twenty["boxes_left_out"] == twenty.left_out["boxes_on_distractors"] == 60
    (tmp_path / "MOT20-01/gt").mkdir(parents=True)
    with pytest.warns(UserWarning, match="taken for MOT20"):
        named = tracking_scores(result, written(tmp_path / "MOT20-01/gt/gt.txt", gt))
    assert named.benchmark == "MOT20" and named["MOTA"] == 1
    with pytest.warns(UserWarning, match="taken for MOT17"):
        guessed = tracking_scores(result, gt.assign(**{"class": gt["class"].replace(6, 7)}))
    assert guessed.benchmark == "MOT17" and guessed["MOTA"] == 1 and "MOT17" in guessed.notes[0]
    with pytest.raises(ValueError, match="known: MOT15"): tracking_scores(result, gt, benchmark="MOT99")
    with pytest.raises(ValueError, match="classes 1 to 13"):
        tracking_scores(result, three_people(lambda i: i - 1), benchmark="MOT17")
    with pytest.raises(ValueError, match="classes 1 to 13"):
        tracking_scores(result, three_people(lambda i: -1), benchmark="MOT17")
    with pytest.raises(ValueError, match="not both"): tracking_scores(result, gt, benchmark="MOT17", classes=1)


def test_world_coordinates_are_no_classes(tmp_path):
    gt = three_people().astype({"class": float}).assign(**{"class": lambda t: t["x"] / 7 - 9.3})
    assert tracking_scores(as_result(three_people()), gt)["MOTA"] == 1 and tracking_scores(gt, gt).benchmark == "MOT15"
    # VisDrone's columns, or MOT15's
    ten = three_people(lambda i: 1 if i == 1 else 4, flag=lambda i: int(i == 1)).assign(occlusion=0)
    with pytest.raises(ValueError, match="VisDrone"):
        tracking_scores(as_result(three_people()), written(tmp_path / "gt.txt", ten))


def test_nothing_left_to_score_is_an_error():
    result = as_result(three_people())
    with pytest.raises(ValueError, match="none of its 90 .*'truth_with_flag_0': 90"):
        tracking_scores(result, three_people(flag=lambda i: 0))
    # ignored rows name people
    assert (match_truth(result, three_people(flag=lambda i: 0)) > 0).all()
    with pytest.raises(ValueError, match="none of its 90"): tracking_scores(result, three_people(), classes=7)
    with pytest.raises(ValueError, match="no class numbers"):
        tracking_scores(result, three_people(lambda i: -1), classes=7)
    with pytest.raises(ValueError, match="no box lies in the frames"):
        tracking_scores(result, three_people(), frames=range(40, 50))
    with pytest.raises(ValueError, match="share no frame"):
        tracking_scores(result.assign(frame=result["frame"] + 100), three_people())
    with pytest.raises(ValueError, match="a flag"): tracking_scores(result, three_people(flag=lambda i: .9))
    with pytest.raises(ValueError, match="is no box"): tracking_scores(result.assign(w=-3), three_people())
    with pytest.raises(ValueError, match="no column x"): tracking_scores(result.drop(columns="x"), three_people())
    with pytest.raises(ValueError, match="classes 1 .30.*2 .30"):
        tracking_scores(three_people(lambda i: i), three_people())
    part = tracking_scores(three_people(lambda i: i), three_people(), classes=1)
    assert part.left_out["boxes_of_other_classes"] == part["boxes_left_out"] == 60
    assert part["recall"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("change,says", [
    (lambda r: r[:0], "result holds no box"), (lambda r: r[r["frame"] < 12], "covers frames 0 to 11"),
    (lambda r: r[r["frame"] % 3 == 0], r"every 3th frame.*range\(0, n, 3\)"),
    (lambda r: r.assign(frame=r["frame"] + 1), "moved by -1 frame.*counts? frames from 0"),
    (lambda r: r[r["frame"] > 0].assign(frame=lambda t: t["frame"] - 1), r"moved by \+1 frame"),
    (lambda r: r.assign(x=r["x"] * 7), "no box overlaps")])
def test_results_that_do_not_fit_their_truth_are_said(change, says):
    truth = three_people(speed=6)
    with pytest.warns(UserWarning, match=says) as caught: scores = tracking_scores(as_result(change(truth)), truth)
    assert len(caught) == len(scores.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tracking_scores(as_result(truth), truth).notes == []


def test_read_mot_takes_what_programs_write(tmp_path):
    want, file = three_people(n=4), tmp_path / "a.txt"
    for sep, encoding in ((",", "utf-8-sig"), (";", "utf-8"), ("\t", "utf-8"), (" ", "utf-8"), (", ", "utf-8")):
        text = want.assign(frame=want["frame"] + 1).astype(str).agg(sep.join, axis=1)
        file.write_bytes("\r\n".join([*text, ""]).encode(encoding))
        pd.testing.assert_frame_equal(read_mot(file), want.astype(read_mot(file).dtypes))
    file.write_text("1.000e+00,2e0,1.5E+02,5e1,4e1,1e2,9.9e-01,-1,-1,-1\n")
    assert read_mot(file)[["frame", "id", "x", "score"]].iloc[0].tolist() == [0, 2, 150, .99]
    assert read_mot(written(file, want, first=0), first_frame=0)["frame"].max() == 3
    for line, says in (("1;1;399,5;182,0;121;229;1", "decimal point"), ("1 1 399,5 182,0 121 229 1", "decimal point"),
                       ("1,1,399,5,182,0,121,2,229,1,1,-1", "12 fields.*not commas"),
                       ("frame,id,x,y,w,h", "delete a header"),
                       ("0 1 Pedestrian 0 0 -1.57 12 50 60 120 1.8 .6 .5 1 2 3 0", "KITTI"),
                       ("1,1.5,0,0,5,5,1", "whole number"),
                       ("1,1,,0,5,5,1", "no row of numbers"), ("1,1,nan,0,5,5,1", "not finite"),
                       ("0,1,0,0,5,5,1", "first_frame=0"),
                       ("1,1,0,0,5,5,1\n2,1,0,0,5,5", "line 2.*6 fields, the first line 7")):
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=says) as e: read_mot(file)
        assert str(file) in str(e.value) and "line " in str(e.value)
    for encoding in ("utf-16", "gbk"):
        file.write_bytes("1,1,0,0,5,5,1 # 行人\n".encode(encoding))
        with pytest.raises(ValueError, match="a.txt.*UTF-8"): read_mot(file)


def test_matching_is_one_to_one():
    gt = pd.DataFrame([(0, 1, 0, 0, 10, 20, 1, -1, -1), (0, 2, 3, 0, 10, 20, 1, -1, -1)], columns=list(MOT_COLUMNS))
    mine = pd.DataFrame(dict(frame=[0, 0, 0], x=[1, 2, 100], y=0, w=10, h=20))
    assert match_truth(mine, gt).tolist() == [1, 2, -1]


def test_mot_round_trip(street, tmp_path):
    samples = T.track(street[0], tmp_path, **OPTIONS)
    back = read_mot(tracklets_to_mot(samples, tmp_path / "r.txt"))
    want = samples.sort_values(["frame", "tracklet"], ignore_index=True)
    assert (back["frame"] == want["frame"]).all() and (back["id"] == want["tracklet"]).all()
    np.testing.assert_allclose(back[list(T.BOX_COLUMNS)], want[list(T.BOX_COLUMNS)], atol=1e-4)

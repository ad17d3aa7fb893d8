"""Id-Free's pages on frames: printed numbers stay, labels are judged by the truth, embeddings are the network's."""
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from cion_nb.companion import scene_pages as S
from cion_nb.companion.claims import paper
from cion_nb.companion.reproduce import Page
from cion_nb.detection.pointid import normalised, PointID


@pytest.fixture(autouse=True)
def settings_of_pictures():
    "A page changes how pictures are saved; the next test shall not see it."
    with matplotlib.rc_context(): yield


def scenes_of(*rows):
    "video, frame, pid, x of boxes 20 wide and 60 high."
    t = pd.DataFrame(rows, columns=["video", "frame", "pid", "x"]).assign(y=0., w=20., h=60., ignored=False, camid=0,
                                                                          split="")
    return t.assign(path=t["video"] + t["frame"].astype(str))


def test_the_last_printed_row_is_three_times_the_sum():
    said = S.printed_sums()
    assert said[0] == "All is three times the sum of the rows in FP, FN and switches"
    assert "74.19; printed: 74.2" in said[1] and "564," in said[2]


def test_a_changed_count_is_told(monkeypatch):
    table = paper("idfree_table3")
    table.loc[0, "fp"] += 1
    monkeypatch.setattr(S, "paper", lambda name: table)
    assert S.printed_sums()[0].startswith("All is not three times")


def test_table_3_stays_as_printed_and_has_ours_beside(monkeypatch):
    ours = pd.DataFrame([dict(detector="middling", tracker=tracker, video="A1", MOTA=.5, IDF1=.6, precision=.9,
                              recall=.8, boxes=100, truth_boxes=200, switches=3)
                         for tracker in ("botsort", "embedding")])
    monkeypatch.setattr(S, "kept_rows", lambda name: pd.DataFrame())
    table = S.idfree_table3(Page("idfree_table3", "smoke"))["table"]
    printed = paper("idfree_table3").set_index("sequence")
    assert table.index.tolist() == printed.index.tolist() and (table["from"] == "printed").all()
    assert table.loc["MOT17-03", ["MOTA", "ML, %", "FN"]].tolist() == ["85.7", "6.8", "11,531"]
    monkeypatch.setattr(S, "kept_rows", lambda name: ours)
    table = S.idfree_table3(Page("idfree_table3", "smoke"))["table"]
    assert table["from"].tolist() == ["printed"] * 8 + ["films, middling boxes"] and table.loc["A1", "FN"] == "40"
    with_ours = S.as_printed(ours)
    assert with_ours.loc[0, ["fp", "fn", "idsw"]].tolist() == [10, 40, 3] and np.isnan(with_ours.loc[0, "mt_pct"])


def test_sequences_that_are_not_there_are_named(tmp_path):
    page = Page("idfree_table3", "smoke")
    S.idfree_table3(page, str(tmp_path), "nowhere")
    assert "no sequence with img1/" in page.failed[(str(tmp_path),)]
    S.idfree_table3(page, str(tmp_path))
    assert "needs weights" in page.failed[(str(tmp_path),)]


def test_a_box_belongs_to_one_person():
    scenes = scenes_of(("a", 0, 1, 0.), ("a", 0, 2, 6.), ("a", 1, 1, 0.))
    found = scenes_of(("a", 0, -1, 4.), ("a", 0, -1, 7.), ("a", 0, -1, 90.), ("a", 1, -1, 9.))
    assert S.true_people(found, scenes).tolist() == [1, 2, -1, -1]


def labelled():
    "Two people of a video of six frames, each with a direction of her own; the second for two frames and unsure."
    scenes = scenes_of(*[("a", f, 1, 0.) for f in range(6)], *[("a", f, 2, 50.) for f in range(6)])
    found = pd.concat([scenes.iloc[:6], scenes.iloc[6:8]], ignore_index=True).assign(score=[.9] * 6 + [.4] * 2)
    return np.eye(2)[[0] * 6 + [1] * 2] + .01, found, scenes


def test_filters_take_away_who_is_short_and_who_is_unsure(monkeypatch):
    x, found, scenes = labelled()
    monkeypatch.setattr(S, "pseudo_labels", lambda *a, **k: PSEUDO(*a, min_samples=2, **k))
    rows = S.pseudo_rows(x, found, scenes, eps=(.3,), shares=(1.,)).set_index("filters")
    assert rows["people"].to_dict() == {"both": 1, "no span": 1, "no score": 1, "neither": 2}
    assert rows["kept"].tolist() == [.5, .5, .5, 1.] and (rows["purity"] == 1).all() and (rows["found"] == 1).all()
    assert np.isclose(rows.loc["both", "recall"], 15 / 16)                 # 15 pairs of her six boxes, 1 of the other's


PSEUDO = S.pseudo_labels


def test_a_person_counts_inside_a_video_and_nobody_known_is_not_judged():
    x, found, scenes = labelled()
    twice = [pd.concat([t, t.assign(video="b", path="b" + t["path"])], ignore_index=True) for t in (found, scenes)]
    rows = S.pseudo_rows(np.concatenate([x, x]), *twice, eps=(.3,), shares=(.5, 1.))
    assert rows["videos"].tolist() == [2, 2, 2, 2, 1] and rows["labelled_videos"].iloc[0] == 2
    assert rows["purity"].iloc[0] == 1 and rows["recall"].iloc[0] > .9
    unknown = S.pseudo_rows(x, found, scenes.assign(pid=-1), eps=(.3,), shares=(1.,))
    assert unknown["purity"].isna().all() and S.draw_filters(unknown) is None
    assert S.with_truth(scenes.assign(true_pid=9))["pid"].eq(9).all()


def test_where_nobody_is_labelled_purity_is_unknown():
    x, found, scenes = labelled()
    rows = S.pseudo_rows(x, found.assign(score=.1), scenes, eps=(.3,), shares=(1.,)).set_index("filters")
    assert np.isnan(rows.loc["both", "purity"]) and rows.loc["both", "kept"] == 0


def test_table_2_stays_as_printed(monkeypatch):
    monkeypatch.setattr(S, "kept_rows", lambda name: pd.DataFrame())
    found = S.idfree_table2(Page("idfree_table2", "smoke"), {})
    assert found["shown"] == ["ours: not run"]
    assert found["table"].loc["Kinetics-150K"].tolist() == ["printed", "150,000", "45,108", "30.1", "57,200", "1.27"]


def test_recipes_stand_on_one_run_of_idfree():
    assert S.search_recipes("tiny") == S.figure4_recipes("tiny") == {}
    found, image = S.search_recipes("tiny", True)["found",], S.image_recipe("tiny")
    assert found["model"] == image and found["data"] == image["data"]
    of = S.figure4_recipes("tiny", True)
    assert of["image",]["model"] == image and of["video",]["model"]["weights"] == image
    assert of["video",]["model"]["found"] == found and of["image",]["data"]["bank"] == "B"
    mine = S.search_recipes("small", data="crowdhuman", data_root="/data/crowd", weights="runs/idfree-1")["found",]
    assert (mine["data"], mine["data_root"], mine["model"]) == ("crowdhuman", "/data/crowd", "runs/idfree-1")
    with pytest.raises(ValueError, match="needs weights"): S.search_recipes("tiny", data="crowdhuman")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return PointID("resnet10_tiny_ibn", channels=16, dim=8, size=(64, 96)).eval()


def test_embeddings_at_middles_are_the_networks(net, tmp_path):
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (128, 192, 3), dtype=np.uint8)
    (tmp_path / "det.txt").write_text("3,-1,10,20,40,60,.9,-1,-1,-1\n3,-1,300,20,40,60,.8,-1,-1,-1\n")
    detector = S.AtMiddles(net, tmp_path / "det.txt")
    (boxes, scores, x), none = detector.detect([frame, frame], [2, 0])
    assert boxes.tolist() == [[10, 20, 50, 80]] and scores.tolist() == [np.float32(.9)] and len(none[0]) == 0
    small = S.fitted(np.ascontiguousarray(frame[..., ::-1]), (64, 96))
    wanted = net.embed_boxes(normalised(small[None], net.input), [np.array([[5, 10, 20, 30]])])[0]
    assert np.allclose(x, wanted, atol=1e-6) and none[2].shape == (0, 8)
    assert np.allclose(S.search_query(net, frame[..., ::-1], (10, 20, 40, 60)), wanted[0], atol=1e-6)


def test_matches_are_one_a_frame_and_never_of_the_querys_own():
    found = pd.DataFrame(dict(path=["own", "a", "a", "b", "c"]))
    x = np.array([[1, 0], [.8, .6], [.9, .4], [0, 1], [.6, .8]])
    assert S.best_matches(np.array([1., 0]), x, found, "own", 3).tolist() == [2, 4, 3]


def test_queries_come_back_in_another_camera():
    scenes = pd.DataFrame(dict(pid=[1, 1, 2, 2, 3, -1], camid=[0, 1, 0, 0, 0, 1], h=[90., 80, 95, 99, 90, 99]))
    assert S.choose_queries(pd.concat([*[scenes.assign(h=9.)] * 4, scenes]), 3)["pid"].tolist() == [1]


def test_each_transform_moves_the_boxes():
    frame, boxes = np.full((108, 192, 3), 99, np.uint8), np.array([[20., 30, 20, 60], [120, 20, 30, 70]])
    views = S.transformed(frame, boxes, (54, 96))
    assert list(views) == ["the frame", *S.SHOWN.values()]
    plain = views["the frame"][1]
    assert np.allclose(plain, boxes / 2)
    for name in ("occlusion", "video jitter", "colour jitter"): assert np.allclose(views[name][1], plain)
    mirrored = views["mirror"][1]
    assert np.allclose(mirrored[:, 0], 96 - plain[:, 0] - plain[:, 2]) and np.allclose(mirrored[:, 2:], plain[:, 2:])
    assert not np.allclose(views["rotate"][1], plain) and (views["zoom in"][1][:, 3] >= plain[:, 3] - 1e-3).any()
    assert len(S.draw_transforms(views).axes) == 9


def test_a_line_a_query_and_network():
    frame = np.zeros((60, 80, 3), np.uint8)
    shown = [(frame, (10, 10, 10, 30), "#3288bd"), (frame, (-5, 10, 10, 30), "#d73027")]
    figure = S.draw_ranked([dict(network="image", pid=1, right=0, shown=shown)] * 2)
    assert len(figure.axes) == 4 and S.draw_ranked([]) is None
    assert S.cut_around(*shown[1]).size == (110, 150)


def test_tracking_is_summed_and_averaged_by_tracker():
    rows = pd.DataFrame([dict(detector="b", tracker="t", MOTA=m, IDF1=.5, HOTA=.5, precision=1., recall=1., switches=2,
                              tracklets=3, people=2) for m in (.2, .4)])
    table = S.tracking_by(rows)
    assert table.loc[("b", "t"), "MOTA"] == 30. and table.loc[("b", "t"), "switches"] == 4

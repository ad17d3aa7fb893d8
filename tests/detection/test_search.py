"""Searching the people of a world's frames: what is asked, what may answer, and what is void."""
import numpy as np
import pandas as pd
import pytest
import torch

from cion_nb.core.images import open_image
from cion_nb.core.samples import read_samples
from cion_nb.data.scenes import frames_of, make_scenes
from cion_nb.detection.find import find_in
from cion_nb.detection.pointid import normalised, PointDetector, PointID
from cion_nb.detection.search import given_features, precision_of, questions, search_scores, search_world

BOX = ["x", "y", "w", "h"]


def table(rows):
    "Rows of pid, camid, tracklet, frame, turned, visibility: a box each, of one video a camera."
    pid, camid, tracklet, frame, turned, seen = map(np.array, zip(*rows))
    paths = [f"c{c}_{f}.jpg" for c, f in zip(camid, frame)]
    box = [[10 * p, 0, 8, 20] for p in pid]
    t = make_scenes(paths, box, camid=camid, video=[f"c{c}" for c in camid], tracklet=tracklet, frame=frame)
    return t.assign(true_pid=pid, turned=turned, visibility=seen, ignored=np.array(seen) < .25)


STREET = table([
    (1, 1, 0, 0, 0, 1.), (1, 1, 0, 12, 0, 1.), (1, 1, 0, 24, 0, .3), (1, 1, 0, 25, 0, 1.),  # 2 s at 12 a second
    (1, 1, 0, 20, 1, 1.),                              # soon, after a turn
    (1, 1, 5, 400, 0, 1.),                                                               # another walk, same camera
    (1, 2, 7, 3, 0, 1.), (1, 2, 7, 4, 0, .1),                                            # another camera, once hidden
    (2, 1, 1, 0, 0, 1.), (2, 2, 8, 3, 0, 1.)])


def test_questions_are_told_apart_by_walk_time_turn_and_camera():
    asked = questions(STREET)
    first = asked[(asked["pid"] == 1) & (asked["path"] == "c1_0.jpg")].iloc[0]
    assert sorted(first["near"]) == ["c1_12.jpg", "c1_24.jpg"]
    assert sorted(first["changed"]) == ["c1_20.jpg", "c2_3.jpg"]
    after = asked[asked["path"] == "c1_20.jpg"].iloc[0]
    assert after["near"] == [] and len(after["changed"]) == 5
    assert "c1_24.jpg" not in set(asked["path"]) and "c2_4.jpg" not in set(asked["path"])    # hidden by half, by most
    slow = questions(STREET, fps=25)
    assert len(slow[slow["path"] == "c1_0.jpg"].iloc[0]["near"]) == 3


def one_hot(numbers): return np.eye(10, dtype=np.float32)[np.asarray(numbers)]


def found_in(t): return t[~t["ignored"]].assign(score=1.)


def test_what_is_between_the_kinds_answers_no_question():
    "Of a network that knows people, whatever it finds in frames that are in no gallery costs nothing."
    found, asked = found_in(STREET), questions(STREET)
    perfect = search_scores(STREET, asked, one_hot(asked["pid"]), found, one_hot(found["true_pid"]))
    assert (perfect.near.mAP, perfect.changed.mAP, perfect.AP50) == (1, 1, 1)
    gone = found[found["path"] != "c1_400.jpg"]                 # in no gallery of its walker but in hers of nobody else
    same = search_scores(STREET, asked, one_hot(asked["pid"]), gone, one_hot(gone["true_pid"]))
    assert same.near.mAP == 1 and same.AP50 < 1
    by_walk = search_scores(STREET, asked, one_hot(asked.merge(STREET, on=["path", *BOX])["tracklet"]), found,
                            one_hot(found["tracklet"]))
    assert by_walk.near.mAP == 1 and by_walk.changed.mAP < 1


def test_who_was_not_found_cannot_be_ranked():
    found, asked = found_in(STREET), questions(STREET)
    found = found[~((found["true_pid"] == 1) & (found["camid"] == 2))]
    score = search_scores(STREET, asked, one_hot(asked["pid"]), found, one_hot(found["true_pid"]))
    row = score.changed.per_query.set_index("path").loc["c1_12.jpg"]
    assert row["present"] == 2 and row["found"] == 1 and row["AP"] == .5
    weak = found.assign(score=.4)
    with pytest.raises(ValueError): search_scores(STREET, asked, one_hot(asked["pid"])[:3], weak, one_hot([1]))


def test_detection_counts_empty_frames_and_ignored_people():
    empty = make_scenes(["c3_0.jpg"], np.zeros((1, 4)), True).assign(true_pid=-1, turned=0, visibility=0.)
    scenes = pd.concat([STREET, empty], ignore_index=True)
    found = found_in(STREET)
    ghost = found.iloc[:1].assign(path="c3_0.jpg", score=2.)
    assert precision_of(scenes, found)["AP"] == 1
    assert precision_of(scenes, pd.concat([found, ghost]))["AP"] < 1
    hidden = STREET[STREET["ignored"]].assign(score=2.)
    assert precision_of(scenes, pd.concat([found, hidden]))["AP"] == 1


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return PointID("resnet10_tiny_ibn", channels=8, dim=16, size=(64, 96)).eval()


def test_a_given_box_is_read_at_its_middle(net, street):
    scenes = read_samples(street)
    rows = scenes[(~scenes["ignored"]) & (scenes["video"] == "v2")].reset_index(drop=True)
    x = given_features(net, street.parent, rows.iloc[::-1])
    image = np.array(open_image(street.parent / rows["path"][3]))
    with torch.no_grad(): m = net(normalised(image[None], net.input))["embedding"][0]
    cx, cy = (rows[["x", "y"]] + rows[["w", "h"]].to_numpy() / 2).iloc[3]
    at = torch.nn.functional.normalize(m[:, int(cy) // 4, int(cx) // 4], dim=0)
    np.testing.assert_allclose(x[len(rows) - 4], at.numpy(), atol=1e-5)


def test_a_search_among_what_a_network_found(net, street, tmp_path):
    scenes = read_samples(street)
    scenes = scenes.assign(turned=(scenes["frame"] > 4).astype(int))
    found = find_in(frames_of(scenes), street.parent, PointDetector(net, min_score=0., k=5), tmp_path / "found")
    score = search_world(scenes, street.parent, found, net, fps=2, min_score=0.)
    assert score.near.protocol == "cuhk_sysu" and 0 <= score.AP50 <= 1 and "AP50" in str(score)
    assert score.changed.n_detections == len(found)
    nobody = scenes.assign(pid=-1)
    with pytest.raises(ValueError, match="no one to search"): search_world(nobody, street.parent, found, net)

"""MARS: tracklets of images, its official protocol, its faults."""
import shutil

import numpy as np
import pytest
from examples import put, quiet, warned
from PIL import Image
from scipy.io import loadmat, savemat

from cion_nb.data.check import check
from cion_nb.data.datasets import read_mars
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.retrieval.protocols import ranked, sides

# ---- MARS ----------

TRACKS = [("00-1", 1), ("0000", 1), ("0000", 2), ("0002", 1), ("0002", 2), ("0002", 1), ("0004", 1), ("0004", 2),
          ("0006", 3)]
QUERIES = (4, 5, 7, 9)                         # 1-based rows; person 2 by two of them, and persons 4 and 6


def mars(home, lists_of_train=True):
    "Three images a tracklet; person 2 has two tracklets in camera 1."
    names, info, count = [], [], {}
    for p, c in TRACKS:
        n = count[p, c] = count.get((p, c), 0) + 1
        info.append([len(names) + 1, len(names) + 3, int(p.replace("00-1", "-1")), c])
        names += [f"{p}C{c}T{n:04d}F00{f}.jpg" for f in (1, 2, 3)]
    train = [f"{p}C{c}T0001F001.jpg" for p in ("0001", "0003") for c in (1, 2)]
    put(home, *(f"bbox_test/{n[:4]}/{n}" for n in names), *(f"bbox_train/{n[:4]}/{n}" for n in train))
    (home / "info").mkdir()
    (home / "info/test_name.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(names).encode())
    savemat(home / "info/tracks_test_info.mat", dict(track_test_info=np.array(info, float)))
    savemat(home / "info/query_IDX.mat", dict(query_IDX=np.array([QUERIES], float)))
    if lists_of_train:
        (home / "info/train_name.txt").write_text("\n".join(train))
        savemat(home / "info/tracks_train_info.mat", dict(
            track_train_info=np.array([[i + 1, i + 1, int(n[:4]), int(n[5])] for i, n in enumerate(train)], float)))
    return home


def test_mars_is_scored_by_its_official_protocol(tmp_path):
    """Ranks by hand: queries stay in the gallery, same person and camera go, junk is not there, distractors are in the
    way.
    """
    table = quiet(read_mars, mars(tmp_path / "MARS").parent)
    assert table.groupby("split").tracklet.nunique().to_dict() == dict(train=4, query=4, gallery=4)
    assert table.tracklet.nunique() == 12
    assert (table.attrs["junk"], table.attrs["junk_tracklets"], table.attrs["unlisted"]) == (3, 1, 0)
    assert {0} <= set(table.pid) and -1 not in set(table.pid)
    assert table.drop(columns="path").equals(
        quiet(read_mars, mars(tmp_path / "b" / "mars-v160809", lists_of_train=False)).drop(columns="path"))
    x = np.random.default_rng(0).normal(size=(len(table), 6)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    f, t = ranked(x, table)
    q, g = sides(t)
    assert (t.split == "query").sum() == len(q) == 4 and len(g) == 8 and set(q) <= set(g)
    score, APs = quiet(evaluate, f[q], f[g], t.iloc[q], t.iloc[g]), []
    mean = {i: x[(table.tracklet == i).to_numpy()].mean(0) for i in t.tracklet}
    who = t.set_index("tracklet")
    for i in t.tracklet[q]:
        left = [j for j in t.tracklet[g] if not (who.pid[j] == who.pid[i] and who.camid[j] == who.camid[i])]
        left.sort(key=lambda j: -mean[i] @ mean[j] / np.linalg.norm(mean[i]) / np.linalg.norm(mean[j]))
        right = [k for k, j in enumerate(left, 1) if who.pid[j] == who.pid[i]]
        APs.append(np.mean([n / k for n, k in enumerate(right, 1)]) if right else np.nan)
    np.testing.assert_allclose(score.AP, APs)
    assert len(score.unmatched) == 1 and score.n_gallery == 8
    # images; person 6 alone
    assert "3 queries have no match in another camera; people: 6" in check(table).problems[-1]
    table.attrs = {}
    # without the fact, person 2's other camera is lost
    assert "6 queries have no match in another camera; people: 2, 6" in check(table).problems[-1]


def test_score_and_fine_tuning_agree_on_mars(tmp_path, monkeypatch):
    from cion_nb.companion.score import score
    from cion_nb.core.settings import recipe
    from cion_nb.models.backbones import create_backbone
    from cion_nb.training.finetune import test_model as tested
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    home = mars(tmp_path / "MARS")
    for i, p in enumerate(sorted(home.rglob("*.jpg"))):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 32, 3), dtype=np.uint8)).save(p)
    model = create_backbone("resnet10_tiny", (64, 32)).eval()
    one = quiet(score, model, "mars", str(tmp_path))
    r = recipe("finetune", "tiny", data="mars", data_root=str(tmp_path))
    two = quiet(tested, model, r, tmp_path / "f")
    assert (one.n_gallery, len(one.per_query), len(one.unmatched)) == (8, 4, 1) and two.asdict() == one.asdict()
    shot = quiet(score, model, "mars", str(tmp_path), draws=2)
    assert shot.n_people == 3 + 2  # three people, two distractors
    assert quiet(score, model, "mars", str(tmp_path), draws=2, distractors=()).n_people == 4
    as_images = quiet(score, model, "mars", str(tmp_path), tracklets=False)
    assert (as_images.n_gallery, len(as_images.per_query)) == (24, 12)


@pytest.mark.parametrize("fault, kind, words", [
    (lambda h: shutil.rmtree(h / "bbox_test/0004"), FileNotFoundError,
     "6 of 27 listed images are not under .*bbox_test/0004/0004C1T0001F001.jpg"),
    (lambda h: [f.unlink() for f in (h / "bbox_train").rglob("*C2*")], FileNotFoundError,
     "2 of 4 listed images are not under"),
    (lambda h: (shutil.rmtree(h / "bbox_test"), (h / "bbox_test").mkdir()), FileNotFoundError, "27 of 27 listed"),
    (lambda h: (h / "info/query_IDX.mat").unlink(), FileNotFoundError, "query_IDX.mat is missing"),
    (lambda h: shutil.rmtree(h / "info"), FileNotFoundError,
     "info/test_name.txt is missing: MARS's queries are defined there. .*MARS/info is not in the arch.*github.com/"),
    (lambda h: (h / "info/query_IDX.mat").write_bytes(b"MATLAB 5.0 MAT-file"), ValueError,
     "query_IDX.mat is no readable MATLAB file"),
    (lambda h: savemat(h / "info/query_IDX.mat", dict(IDX=[1])), ValueError, "query_IDX.mat has no query_IDX, but IDX"),
    (lambda h: savemat(h / "info/query_IDX.mat", dict(query_IDX=[[4, 10]])), ValueError,
     "asks for row 10 of 9 tracklets"),
    (lambda h: savemat(h / "info/query_IDX.mat", dict(query_IDX=[[2]])), ValueError,
     "asks for junk or distractors: bbox_test/0000"),
    (lambda h: rows(h, lambda t: t.__setitem__((3, 2), 4)), ValueError,
     "row 4: person 4 in camera 1, but its images are named like bbox_test/0002/0002C1"),
    (lambda h: rows(h, lambda t: t.__setitem__((3, 1), 13)), ValueError, "rows 4 and 5 both hold image 13"),
    (lambda h: rows(h, lambda t: t.__setitem__((8, 1), 99)), ValueError, "row 9: images 25 to 99 of a list of 27"),
    (lambda h: (h / "info/test_name.txt").write_text("someone.jpg"), ValueError,
     "test_name.txt/someone.jpg: not named like 0001C1T0001F001.jpg")])
def test_faults_of_mars_are_named(tmp_path, fault, kind, words):
    home = mars(tmp_path / "MARS")
    fault(home)
    with pytest.raises(kind, match=words): quiet(read_mars, tmp_path)


def rows(home, change):
    file = home / "info/tracks_test_info.mat"
    t = loadmat(file)["track_test_info"]
    change(t)
    savemat(file, dict(track_test_info=t))


def test_what_mars_leaves_out_is_counted(tmp_path):
    home = mars(tmp_path / "MARS")
    whole = quiet(read_mars, tmp_path)
    put(home, "bbox_test/0002/0002C1T0001F001 - Copy.jpg", "bbox_train/0001/0001C1T0009F001.jpg")
    rows(home, lambda t: t.__setitem__((8, 1), 26))
    table, said = warned(read_mars, tmp_path)
    assert table.attrs["unlisted"] == 3 and len(table) == len(whole) - 1
    assert "3 images on disk in no list, left out" in check(table).notes
    assert sum("in no list and left out" in s for s in said) == 2
    assert sum("1 listed image is in no tracklet and left out" in s for s in said) == 1
    problems = check(table).problems
    for line in ("train: 4 images, published are 509,914", "query: 4 tracklets, published are 1,980",
                 "gallery: 4 tracklets, published are 9,330", "junk: 1 tracklets, published are 870",
                 "in all: 30 images, published are 1,191,003"):
        assert line in problems

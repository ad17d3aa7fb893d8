"""CUHK-SYSU and PRW against loops over made-up sets in their layouts, the protocols on them, what is refused."""
import re

import numpy as np
import pandas as pd
import pytest
from examples import quiet, warned
from scene_sets import cells, expected, Prw, rows_of, scenes, structs, Sysu
from scipy.io import savemat

from cion_nb.core.samples import write_samples
from cion_nb.data.scenes import read_cuhk_sysu, read_prw, read_scenes_table
from cion_nb.retrieval.person_search import evaluate_search

LISTS = "CUHK-SYSU/annotation/"
HOME = "PRW-v16.04.20"


def perfect(table, protocol, size=100):
    "Score of a detector that finds everybody and an embedding that knows everybody."
    query, truth = (table[table.split == s].reset_index(drop=True) for s in ("query", "gallery"))
    found = truth[~truth.ignored].reset_index(drop=True)
    n = int(table.pid.max()) + 1
    code = np.where(found.pid >= 0, found.pid, n + np.arange(len(found)))
    eye = np.eye(n + len(found))
    return evaluate_search(query, eye[query.pid], found, eye[code], truth, protocol, size)


# ---- CUHK-SYSU -----------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_cuhk_sysu_by_loops(tmp_path, seed):
    sysu = Sysu(seed)
    table = quiet(read_cuhk_sysu, sysu.write(tmp_path))
    frames, asked, named = table[table.split != "query"], table[table.split == "query"], sysu.named()
    below = "CUHK-SYSU/Image/SSM/"
    truth = [(below + name, [(*box, False, named.get((name, tuple(box)), -1)) for box in boxes]) for name, boxes in
             sysu.images]
    assert rows_of(frames) == expected(truth)
    assert frames.pid.tolist() == [row[5] for _, rows in truth for row in rows]
    assert set(frames.path[frames.split == "gallery"]) == {below + name for name in sysu.pool}
    assert len(set(named.values())) == len(sysu.train) + len(sysu.queries)
    assert [(row.path, [row.x, row.y, row.w, row.h], row.pid) for row in asked.itertuples()] == [
        (below + name, box, len(sysu.train) + 1 + k) for k, ((name, box), _) in enumerate(sysu.queries)]
    assert asked.attrs["galleries"] == {100: [[below + name for name, _ in gallery] for _, gallery in sysu.queries]}
    assert table.attrs["counts"]["boxes"] == sum(len(boxes) for _, boxes in sysu.images)
    assert (table[["camid", "tracklet", "frame"]] == -1).all(axis=None)


def test_cuhk_sysu_is_scored_by_its_lists(tmp_path):
    sysu = Sysu(2, size=50)
    table = quiet(read_cuhk_sysu, sysu.write(tmp_path), 50)
    score = perfect(table, "cuhk_sysu", 50)
    assert (score.mAP, score.rank1, score.recall) == (1, 1, 1)
    seen = [len(gallery) for _, gallery in sysu.queries]
    assert score.n_gallery == np.mean(seen)
    present = [sum(box is not None for _, box in gallery) for _, gallery in sysu.queries]
    assert score.per_query.present.tolist() == present
    again = read_scenes_table(write_samples(table, tmp_path / "t.parquet"))           # galleries come back by number
    assert perfect(again, "cuhk_sysu", 50).asdict() == score.asdict()
    with pytest.raises(ValueError, match="TestG100.mat"): perfect(table, "cuhk_sysu", 100)


def test_cuhk_sysu_is_compared_with_what_is_published(tmp_path):
    (_, said) = warned(read_cuhk_sysu, Sysu(0).write(tmp_path))
    assert len(said) == 1
    assert said[0].startswith("CUHK-SYSU: not the published set (train: 5 frames, published are 11,206")
    assert "gallery: 7 frames, published are 6,978" in said[0] and "boxes, published are 40,871" in said[0]
    assert re.search(r"query: \d queries, published are 2,900", said[0])


def test_a_box_without_area_is_nobody(tmp_path):
    sysu = Sysu(1)
    name, boxes = sysu.images[-1]
    boxes.append([3, 4, 0, 12])
    sysu.queries[0][1].append((name, [3, 4, 0, 12]))
    table = quiet(read_cuhk_sysu, sysu.write(tmp_path))
    flat = table[table.w == 0]
    assert flat.ignored.tolist() == [True] and flat.pid.tolist() == [-1] and table.attrs["counts"]["no_area"] == 1


def test_frames_without_a_box_and_one_of_two_equal_boxes(tmp_path):
    sysu = Sysu(3)
    sysu.images.append(("s99.jpg", []))
    name, box = sysu.queries[0][0]
    dict(sysu.images)[name].append(box)
    table = quiet(read_cuhk_sysu, sysu.write(tmp_path))
    empty = table[table.path.str.endswith("s99.jpg")]
    assert empty[["x", "y", "w", "h", "ignored", "pid"]].values.tolist() == [[0, 0, 0, 0, True, -1]]
    own = table[table.path.str.endswith(f"/{name}") & (table.split == "gallery")]
    equal = own[(own[["x", "y", "w", "h"]] == box).all(axis=1)]
    assert len(equal) == 2 and equal.pid.tolist() == [len(sysu.train) + 1, -1]            # the first of the two


def other(**lists):
    "A file of another content."
    def fault(root):
        for file, (variable, value) in lists.items():
            savemat(next(root.rglob(f"{file}.mat")), {variable: value})
    return fault


def lost(*names): return lambda root: [next(root.rglob(name)).unlink() for name in names]


def person(*rows): return structs(("idname", "nAppear", "scene"), [("p1", 1, scenes(rows))])


def asked(*rows): return structs(("imname", "idlocate"), [(name, np.array([box], float)) for name, box in rows])


def image(*boxes): return structs(("imname", "nAppear", "box"), [("s1.jpg", 0, structs(("idlocate",), [
    (np.array([b], float),) for b in boxes]))])


@pytest.mark.parametrize("fault, kind, words", [
    (lost("TestG100.mat"), FileNotFoundError,
     "TestG100.mat is missing: it says who is asked for, and in which 100 frames; unpack the data set's annotation/"),
    (lambda root: next(root.rglob("TestG100.mat")).rename(root / LISTS / "test/train_test/TestG500.mat"),
     FileNotFoundError, "TestG100.mat is missing.*gallery_size=500 is there: ask for it"),
    (lost("Images.mat"), FileNotFoundError, "Images.mat is missing: unpack the data set again"),
    (lost("pool.mat"), FileNotFoundError, "pool.mat is missing"),
    (lost("Train.mat"), FileNotFoundError, "Train.mat is missing"),
    (lambda root: next(root.rglob("Train.mat")).write_bytes(b"MATLAB 5.0"), ValueError, "Train.mat is no readable"),
    (lost("s*.jpg"), FileNotFoundError, "Images.mat: 1 of 12 frames are not under .*: CUHK-SYSU/Image/SSM/s"),
    (other(pool=("frames", cells(["s1.jpg"]))), ValueError, "pool.mat has no pool, but frames"),
    (other(pool=("pool", cells(["s777.jpg"]))), ValueError, "pool.mat: Images.mat knows nothing of s777.jpg; take"),
    (other(Train=("Train", cells([person(("s777.jpg", [1, 2, 3, 4]))]))), ValueError,
     r"Train.mat, person 1: .*Images.mat has no box \[1.0, 2.0, 3.0, 4.0\] in s777.jpg; take both from one release"),
    (other(Train=("Train", cells([np.eye(2)]))), ValueError, "Train.mat, person 1: expected a struct with scene, fou"),
    (other(Images=("Img", image([1, 2, 3]))), ValueError, r"Images.mat, image 1 \(s1.jpg\), box 1: .* is no box"),
    (other(Images=("Img", np.hstack([image([1, 2, 3, 4])] * 2))), ValueError, "Images.mat: s1.jpg there twice"),
    (other(Images=("Img", structs(("name",), [("s1.jpg",)]))), ValueError, "Images.mat: expected a struct with imname"),
    (other(TestG100=("TestG100", structs(("Query", "Gallery"), [(asked(("a", [1, 2, 3, 4]), ("b", [1, 2, 3, 4])),
                                                                 scenes([("a", None)]))]))), ValueError,
     "TestG100.mat, query 1: expected one box, found 2")])
def test_cuhk_sysu_refuses_and_names(tmp_path, fault, kind, words):
    fault(Sysu(0).write(tmp_path))
    with pytest.raises(kind, match=words): quiet(read_cuhk_sysu, tmp_path)


def test_cuhk_sysu_boxes_that_are_none_are_named(tmp_path):
    sysu = Sysu(0)
    free = [name for name, _ in sysu.images]
    dict(sysu.images)[free[1]].append([1, np.nan, 3, 4])
    with pytest.raises(ValueError, match=rf"Images.mat, image 2 \({free[1]}\), box \d+: \[1.0, nan, 3.0, 4.0\] of "):
        quiet(read_cuhk_sysu, sysu.write(tmp_path))
    sysu = Sysu(0)
    sysu.queries[0][1].append((sysu.images[0][0], None))                       # a frame that trains
    with pytest.raises(ValueError, match=f"TestG100.mat, query 1: pool.mat knows nothing of {sysu.images[0][0]}"):
        quiet(read_cuhk_sysu, sysu.write(tmp_path))


# ---- PRW -----------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_prw_by_loops(tmp_path, seed):
    prw = Prw(seed)
    table = quiet(read_prw, prw.write(tmp_path))
    frames, asked = table[table.split != "query"], table[table.split == "query"]
    truth = [(f"{HOME}/frames/{name}.jpg", [(*box, False, pid) for pid, *box in prw.frames[name][1]])
             for name in prw.train + prw.test]
    assert rows_of(frames) == expected(truth)
    pids = [-1 if row[5] == -2 else row[5] for _, rows in truth for row in rows or [(0,) * 5 + (-1,)]]
    assert frames.pid.tolist() == pids
    for row in table.itertuples():
        camid, video, frame = re.fullmatch(r".*/c(\d)s(\d)_(\d+).jpg", row.path).groups()
        assert (row.camid, row.video, row.frame) == (int(camid), f"c{camid}s{video}", int(frame))
    assert set(frames.path[frames.split == "train"]) == {f"{HOME}/frames/{name}.jpg" for name in prw.train}
    assert [(row.path, row.pid, [row.x, row.y, row.w, row.h]) for row in asked.itertuples()] == [
        (f"{HOME}/frames/{name}.jpg", pid, box) for pid, box, name in prw.queries]
    inside = [(x, y, w, h) for _, rows in truth for x, y, w, h, *_ in rows]
    assert table.attrs["counts"]["outside"] == sum(x < 0 or y < 0 or x + w > 64 or y + h > 48 for x, y, w, h in inside)
    assert table.attrs["unlisted_people"] == 0


def test_prw_is_scored_in_all_frames_of_the_test(tmp_path):
    prw, pid = Prw(3), 7
    for name in prw.test:
        rows = prw.frames[name][1]
        rows[:] = [row for row in rows if row[0] != pid]
    for name in prw.test[:2]: prw.frames[name][1].append([pid, 1., 1., 20., 30.])
    prw.queries = [(pid, [2, 1, 20, 30], prw.test[0])]
    score = perfect(quiet(read_prw, prw.write(tmp_path)), "prw")
    assert (score.mAP, score.recall, score.n_gallery) == (1, 1, len(prw.test) - 1)
    prw.frames[prw.test[1]][1].append([pid, 30., 1., 20., 30.])                  # named twice: the first keeps the name
    table, said = warned(read_prw, prw.write(tmp_path))
    assert any(f"a person who is named in that frame already: {HOME}/frames/{prw.test[1]}.jpg" in s for s in said)
    assert perfect(table, "prw").mAP == 1


def test_people_that_the_training_list_does_not_have(tmp_path):
    prw = Prw(0)
    prw.frames[prw.train[0]][1][:] = [[2, 1., 1., 9., 9.], [5, 20., 1., 9., 9.]]
    table = quiet(read_prw, prw.write(tmp_path))
    assert table.pid[table.path.str.contains(prw.train[0])].tolist() == [2, -1] and table.attrs["unlisted_people"] == 1
    next(tmp_path.rglob("ID_train.mat")).unlink()
    table = quiet(read_prw, tmp_path)
    assert table.pid[table.path.str.contains(prw.train[0])].tolist() == [2, 5] and table.attrs["unlisted_people"] == 0


def test_prw_is_compared_with_what_is_published(tmp_path):
    said = warned(read_prw, Prw(1).write(tmp_path))[1]
    assert len(said) == 1
    assert "PRW: not the published set (train: 4 frames, published are 5,704; gallery: 6 frames" in said[0]
    assert "queries, published are 2,057" in said[0] and "people" not in said[0] and "boxes" not in said[0]


def boxes_of(**rows):
    def fault(root):
        file = next((root / HOME / "annotations").glob("*.mat"))
        savemat(file, {name: np.array(value) for name, value in rows.items()})
    return fault


def queries(text): return lambda root: (root / HOME / "query_info.txt").write_text(text)


@pytest.mark.parametrize("fault, kind, words", [
    (lost("query_info.txt"), FileNotFoundError, "query_info.txt is missing: it says who is asked for"),
    (lost("frame_test.mat"), FileNotFoundError, "frame_test.mat is missing"),
    (lost("c*.jpg.mat"), FileNotFoundError, r"annotations/c.*jpg.mat is missing"),
    (lost("c*.jpg"), FileNotFoundError, "frame_train.mat and frame_test.mat: 1 of 10 frames are not under"),
    (boxes_of(boxes=np.eye(5)), ValueError, "jpg.mat has no box_new or anno_file or anno_previous, but boxes"),
    (boxes_of(box_new=np.ones((2, 4))), ValueError, r"jpg.mat: expected rows of id, left, .*, found shape \(2, 4\)"),
    (boxes_of(anno_file=[[1., 1, 1, 9, 9], [-3., 1, 1, 9, 9]]), ValueError, "jpg.mat, row 2: -3 is no person: ids"),
    (boxes_of(anno_file=[[1.5, 1, 1, 9, 9]]), ValueError, "row 1: 1.5 is no person"),
    (boxes_of(box_new=[[np.nan, 1, 1, 9, 9]]), ValueError, "row 1: nan is no person"),
    (boxes_of(box_new=[[1, 1, np.nan, 9, 9]]), ValueError, r"jpg.mat, row 1: \[1.0, nan, 9.0, 9.0\] of .* is no box"),
    (boxes_of(box_new=[[-2, 1, 1, -9, 9]]), ValueError, r"jpg.mat, row 1: .* the latter two not below 0"),
    (other(frame_train=("img_index_train", cells(["c1s1_000001", "video_3"]))), ValueError,
     "frame_train.mat: 'video_3' not named like c1s3_016471"),
    (other(frame_train=("img_index_train", cells(["c1s1_000001"] * 2))), ValueError, "name c1s1_000001 twice"),
    (queries("3 1 2 3 c1s1_000001"), ValueError, "query_info.txt, line 1: expected 'id left top width height frame'"),
    (queries("\n3 1 2 three 4 c1s1_000001"), ValueError, "line 2: expected"),
    (queries("-2 1 2 3 4 c1s1_000001"), ValueError, "line 1: expected"),
    (queries("3 1 2 3 4 c9s9_999999"), ValueError, r"line 1: c9s9_999999 is no frame of the test \(frame_test.mat\)")])
def test_prw_refuses_and_names(tmp_path, fault, kind, words):
    fault(Prw(0).write(tmp_path))
    with pytest.raises(kind, match=words): quiet(read_prw, tmp_path)


@pytest.mark.parametrize("box, words", [("1 2 0 4", "has no area or is ignored: nobody can be searched by it"),
                                        ("1 nan 3 4", "is no box"), ("1 2 3 -4", "is no box")])
def test_a_query_that_is_no_box_is_named_with_its_line(tmp_path, box, words):
    prw = Prw(0)
    (prw.write(tmp_path) / HOME / "query_info.txt").write_text(f"3 1 2 3 4 {prw.test[0]}\n3 {box} {prw.test[1]}\n")
    with pytest.raises(ValueError, match=f"query_info.txt, line 2: .*{words}"): quiet(read_prw, tmp_path)


@pytest.mark.parametrize("read, made", [(read_cuhk_sysu, Sysu), (read_prw, Prw)])
def test_a_set_is_found_at_its_folder_and_above(tmp_path, read, made):
    made(0).write(tmp_path / "sets")
    home = next(p for p in (tmp_path / "sets").iterdir())
    whole = quiet(read, tmp_path / "sets")
    inner = quiet(read, home)
    pd.testing.assert_frame_equal(inner.assign(path=f"{home.name}/" + inner.path), whole)
    assert all((tmp_path / "sets" / path).is_file() for path in whole.path)
    assert all((home / path).is_file() for path in inner.path)

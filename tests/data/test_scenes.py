"""The scenes table: what holds in it, frames and their boxes, size, several tables as one, and a recipe's frames."""
import copy
import json
import pickle

import numpy as np
import pandas as pd
import pytest
from examples import quiet, warned
from hypothesis import given, settings, strategies as st
from scene_sets import expected, rows_of, Sysu, write_coco, write_crowdhuman, write_mot

from cion_nb.core.samples import make_samples, write_samples
from cion_nb.data.datasets import data_sets, read_data, reader_of
from cion_nb.data.facts import DATASETS
from cion_nb.data.scenes import (
    as_scenes,
    BOX,
    boxes_in,
    frames_of,
    join_scenes,
    make_scenes,
    read_crowdhuman,
    read_mot_sequence,
    read_scenes,
    read_scenes_table,
    SCENE_READERS,
    scene_sets_of,
)
from cion_nb.data.tracking import BOX_COLUMNS


def random_scenes(seed, n=40, n_frames=9):
    "Rows in disorder: frames interleaved, boxes without area, ignored ones, queries."
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, n_frames, n)
    box = rng.uniform(-5, 60, (n, 4)).round(2)
    box[:, 2:] = np.where(rng.random((n, 2)) < .1, 0, np.abs(box[:, 2:]) + .5)
    is_query = (rng.random(n) < .15) & (box[:, 2:] > 0).all(1)
    columns = dict(pid=np.arange(n) + 1, video=[f"v{f % 3}" for f in frame], frame=frame, camid=frame % 3,
                   tracklet=1000 * (frame % 3) + rng.permutation(n), split=np.where(is_query, "query", "gallery"),
                   ignored=(rng.random(n) < .3) & ~is_query)
    return make_scenes([f"{f}.jpg" for f in frame], box, **columns), box, columns


# ---- the table ------------------------------------------------------------------

@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_what_a_table_holds_is_what_was_given_but_for_nobodies(seed):
    table, box, given = random_scenes(seed)
    no_area, ignored = 0, 0
    for i, row in enumerate(table.itertuples()):
        has_area = box[i, 2] > 0 and box[i, 3] > 0
        assert [row.x, row.y, row.w, row.h] == [np.float32(v) for v in box[i]] and row.score == 1
        assert row.ignored == (bool(given["ignored"][i]) or not has_area)
        assert (row.pid, row.tracklet) == ((-1, -1) if row.ignored else (given["pid"][i], given["tracklet"][i]))
        no_area += not has_area and not given["ignored"][i]
        ignored += has_area and bool(given["ignored"][i])
    counts, asked = table.attrs["counts"], given["split"] == "query"
    assert (counts["no_area"], counts["ignored"]) == (no_area, ignored)
    assert counts["frames"] == len({p for p, q in zip(table.path, asked) if not q})
    outside = [i for i in range(len(box)) if min(box[i, :2]) < 0 < min(box[i, 2:]) and not asked[i]]
    assert counts["outside"] == len(outside)
    again = as_scenes(table)
    pd.testing.assert_frame_equal(again, table)
    assert again.attrs == table.attrs
    assert {c: str(table[c].dtype) for c in (*BOX_COLUMNS, "ignored")} == dict.fromkeys(BOX_COLUMNS, "float32") | dict(
        ignored="bool")


def test_outside_is_counted_at_every_edge_where_the_size_is_known():
    boxes = [[0, 0, 10, 20], [-.5, 0, 5, 5], [0, -1, 5, 5], [5.5, 0, 5, 5], [0, 16, 5, 5]]
    paths = list("abcde")
    def outside(size): return make_scenes(paths, boxes, size=size).attrs["counts"]["outside"]
    assert (outside(None), outside((10, 20)), outside((np.nan, 0))) == (2, 4, 2)
    assert outside([(10, 20)] * 4 + [(0, 0)]) == 3
    kept = make_scenes(paths, boxes, size=(10, 20))
    assert kept[BOX].to_numpy().tolist() == boxes and not kept.ignored.any()


def test_a_person_is_once_in_a_frame_and_a_query_asks_for_her_there():
    box = np.tile([1., 2, 3, 4], (6, 1))
    table, said = warned(make_scenes, list("aabbba"), box, pid=[4, 4, 4, -1, -1, 4], tracklet=[1, 2, 1, 9, 9, -1],
                         split=["gallery"] * 5 + ["query"])
    assert table.pid.tolist() == [4, -1, 4, -1, -1, 4] and table.tracklet.tolist() == [1, -1, 1, 9, -1, -1]
    assert not table.ignored.any() and table.attrs["counts"]["named_twice"] == 2
    assert len(said) == 1
    assert "2 boxes name a person who is named in that frame already: a, b; the first keeps" in said[0]
    assert not warned(as_scenes, table)[1]


@pytest.mark.parametrize("change, words", [
    (dict(box=[[1, 2, 3, 4], [1, np.nan, 3, 4]]), r"row 1: \[1.0, nan, 3.0, 4.0\] of b is no box: left, top, width"),
    (dict(box=[[1, np.inf, 3, 4], [1, 2, 3, -4]]), r"row 0: .* of a is no box, nor are 1 other"),
    (dict(box=[[1, 1e39, 3, 4], [1, 2, 3, 4]]), "row 0: .* is no box"),
    (dict(box=[[1, 2, 3, 4]]), "box has 1 rows, 'path' has 2"),
    (dict(ignored=[True, None]), "row 1: ignored is None: true or false"),
    (dict(split="query", ignored=True), r"row 0: the box \[1.0, 2.0, 3.0, 4.0\] of a query in a has no area or is ign"),
    (dict(split="query", box=[[1, 2, 3, 4], [1, 2, 3, 0]]), "row 1: the box .* of a query in b has no area"),
    (dict(path=["a", "a"], camid=[1, 2]), "a: its rows have camid 1 and 2: a frame is one moment of one camera"),
    (dict(path=["a", "a"], frame=[1, 2], split=["train", "gallery"]), "frame 1 and 2, split 'train' and 'gallery'"),
    (dict(path=["a", "a"], video=["x", "y"]), "a: its rows have video 'x' and 'y'"),
    (dict(tracklet=[3, 3], video=["x", "y"]), "column 'tracklet': 3 is used in videos")])
def test_what_cannot_be_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        make_scenes(**dict(path=["a", "b"], box=[[1, 2, 3, 4]] * 2) | change)


def test_errors_call_a_row_as_its_reader_does_and_text_is_no_box():
    with pytest.raises(ValueError, match=r"list.txt, line 8: \[1.0, 2.0, 3.0, nan\]"):
        make_scenes(["a"], [[1, 2, 3, np.nan]], called=lambda i: f"list.txt, line {i + 8}")
    table = make_scenes(["a", "b"], [[1, 2, 3, 4]] * 2)
    with pytest.raises(ValueError, match="row 1: .*wide.* of b is no box"):
        as_scenes(table.assign(w=[3, 3], h=["4", "wide"]))
    with pytest.raises(ValueError, match="no column h, ignored: a scenes table .*crops, as `track` cuts them"):
        as_scenes(table.drop(columns=["h", "ignored"]))


def test_parquet_keeps_a_table_and_its_galleries(tmp_path):
    table, *_ = random_scenes(3)
    n = int((table.split == "query").sum())
    table.attrs["galleries"] = {100: [["0.jpg"]] * n, 50: [[]] * n}
    table = as_scenes(table)
    cut = table[table.split == "query"].reset_index(drop=True)
    assert cut.attrs["galleries"] is table.attrs["galleries"] is copy.deepcopy(table.attrs)["galleries"]
    again = read_scenes_table(write_samples(table, tmp_path / "t.parquet"))
    pd.testing.assert_frame_equal(again, table)
    assert again.attrs == table.attrs and set(again.attrs["galleries"]) == {50, 100}
    write_samples(table[:0], tmp_path / "none.parquet")
    write_samples(make_samples(["a"]).assign(x=0., y=0., w=1., h=1.), tmp_path / "crops.parquet")
    for name, words in (("none", "there is no frame in it"), ("crops", "no column ignored")):
        file = tmp_path / f"{name}.parquet"
        with pytest.raises(ValueError, match=f"{name}.parquet: {words}"): read_scenes_table(file)


# ---- frame by frame -------------------------------------------------------------

@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=25, deadline=None)
def test_frames_and_their_boxes_by_loops(seed, shuffled):
    table, *_ = random_scenes(seed)
    if shuffled: table = table.sample(frac=1, random_state=seed % 1000)        # its index is in disorder, too
    frames, inside, seen = frames_of(table), boxes_in(table), {}
    for k, row in enumerate(table.itertuples()): seen.setdefault((row.path, row.split == "query"), []).append((k, row))
    assert len(frames) == len(inside) == len(seen)
    for i, ((path, is_query), rows) in enumerate(seen.items()):
        told, first = frames.iloc[i], rows[0][1]
        assert (told.path, told.split) == (path, "query" if is_query else "gallery")
        assert (told.video, told.camid, told.frame) == (first.video, first.camid, first.frame)
        counting = sum(not r.ignored for _, r in rows)
        assert (told["first"], told["rows"], told["boxes"]) == (rows[0][0], len(rows), counting)
        shown = [(k, r) for k, r in rows if r.w > 0 and r.h > 0]
        assert inside[i].box.tolist() == [[r.x, r.y, r.w, r.h] for _, r in shown] and inside[i].box.shape[1:] == (4,)
        assert inside[i].row.tolist() == [k for k, _ in shown]
        for name in ("pid", "tracklet", "ignored"):
            assert getattr(inside[i], name).tolist() == [getattr(r, name) for _, r in shown]
    assert [b.row.tolist() for b in inside] == [inside[i - len(inside)].row.tolist() for i in range(len(inside))]
    for i in (len(inside), -len(inside) - 1):
        with pytest.raises(IndexError): inside[i]


def test_boxes_cross_to_a_worker_and_have_their_kinds():
    inside = boxes_in(random_scenes(1)[0])
    again = pickle.loads(pickle.dumps(inside))
    assert all(np.array_equal(a, b) for one, two in zip(inside, again, strict=True) for a, b in zip(one, two))
    kinds = [x.dtype for x in inside[0]]
    assert kinds == [np.float32, np.int64, np.int64, bool, np.int64] and inside.box.flags.c_contiguous


def test_nobody_anywhere():
    empty = make_scenes(["a", "b"], np.zeros((2, 4)), ignored=True, split="train")
    assert empty.attrs["counts"] == dict(frames=2, boxes=0, ignored=0, empty=2, outside=0, no_area=0, named_twice=0)
    assert frames_of(empty)[["boxes", "rows"]].values.tolist() == [[0, 1]] * 2
    assert [len(b.box) for b in boxes_in(empty)] == [0, 0]
    none = make_scenes([], [])
    assert len(none) == len(frames_of(none)) == len(boxes_in(none)) == 0 and str(none.x.dtype) == "float32"


def test_ten_thousand_boxes_in_a_frame_and_a_hundred_thousand_rows(tmp_path):
    rng = np.random.default_rng(0)
    crowd = make_scenes(["a"] * 10_000 + ["b"], np.vstack([rng.uniform(1, 50, (10_000, 4)), np.zeros(4)]),
                        tracklet=[*range(10_000), -1], ignored=[False] * 10_000 + [True])
    inside = boxes_in(crowd)
    assert (inside[0].box.shape, inside[1].box.shape) == ((10_000, 4), (0, 4))
    assert inside[0].tracklet.tolist() == [*range(10_000)]
    frame = np.sort(rng.integers(0, 9_000, 100_000))
    paths = [f"{f:05d}.jpg" for f in frame]
    many = make_scenes(paths, rng.uniform(1, 90, (100_000, 4)), frame=frame, size=(1920, 1080))
    again = read_scenes_table(write_samples(many, tmp_path / "many.parquet"))
    frames, inside = frames_of(again), boxes_in(again)
    assert frames["rows"].sum() == sum(len(b.box) for b in inside) == 100_000
    k = 4_321
    assert inside[k].box.tolist() == again.loc[again.path == frames.path[k], BOX].values.tolist()
    people = [dict(fbox=[1, 2, 3, 4], tag="person")] * 10_000
    (tmp_path / "people.odgt").write_text(json.dumps(dict(ID="a", gtboxes=people)))
    (tmp_path / "a.jpg").touch()
    assert read_crowdhuman(tmp_path / "people.odgt", tmp_path).attrs["counts"]["boxes"] == 10_000


# ---- several sets, and recipes ---------------------------------------------------

def detection_root(root):
    "COCO, CrowdHuman and MOT sequences beside each other, as a recipe's data_root holds them."
    truth = {}
    coco = write_coco(root / "COCO2017", 1)
    (root / "COCO2017/annotations").mkdir()
    (root / "COCO2017/instances.json").rename(root / "COCO2017/annotations/instances_train2017.json")
    (root / "COCO2017/images").rename(root / "COCO2017/train2017")
    truth["coco"] = [(f"COCO2017/train2017/{path}", rows) for path, rows in coco]
    truth["crowdhuman"] = [(f"crowd_human/{path}", rows) for path, rows in write_crowdhuman(root / "crowd_human", 2)]
    truth["mot"] = [(f"MOT17/train/{path}", rows) for path, rows in write_mot(root / "MOT17/train", 3)]
    return truth


def test_a_recipe_names_one_set_or_several(tmp_path):
    truth, tables = detection_root(tmp_path), {}
    for name in truth:
        tables[name], root = quiet(read_data, dict(data=name, data_root=str(tmp_path)), "frames")
        assert rows_of(tables[name]) == expected(truth[name]) and root == tmp_path
        assert all((root / path).is_file() for path in tables[name].path)
    joint, _ = quiet(read_data, dict(data="mot, coco,crowdhuman", data_root=str(tmp_path)), "frames")
    assert rows_of(joint) == expected(truth["mot"] + truth["coco"] + truth["crowdhuman"])
    assert joint.attrs["dataset"] == "mot,coco,crowdhuman" and joint.attrs["parts"]["mot"] == tables["mot"].attrs
    for name, n in joint.attrs["counts"].items(): assert n == sum(t.attrs["counts"][name] for t in tables.values())
    inner = quiet(read_data, dict(data="crowdhuman", data_root=str(tmp_path / "crowd_human")), "frames")[0]
    assert inner.path[0] == truth["crowdhuman"][0][0].removeprefix("crowd_human/")
    asked = dict(data="coco", data_root=str(tmp_path / "COCO2017/train2017"),
                 annotation=str(tmp_path / "COCO2017/annotations/instances_train2017.json"))
    assert rows_of(quiet(read_data, asked, "frames")[0]) == expected(
        [(path.removeprefix("COCO2017/train2017/"), rows) for path, rows in truth["coco"]])
    kept = write_samples(joint, tmp_path / "joint.parquet")
    again, root = read_data(dict(data=str(kept)), "frames")
    pd.testing.assert_frame_equal(again, joint)
    elsewhere = str(tmp_path / "COCO2017")
    assert root == tmp_path and str(read_data(dict(data=str(kept), data_root=elsewhere), "frames")[1]) == elsewhere


def test_joint_tables_keep_everybody_apart(tmp_path):
    write_mot(tmp_path / "one", 5)
    write_mot(tmp_path / "two", 6)
    one, two = quiet(read_mot_sequence, tmp_path / "one"), quiet(read_mot_sequence, tmp_path / "two")
    sysu = quiet(read_scenes, "cuhk_sysu", Sysu(4).write(tmp_path))
    joint = join_scenes(dict(a=one.assign(camid=1), b=two.assign(path="two/" + two.path, camid=1), c=sysu))
    parts = np.repeat([0, 1, 2], [len(one), len(two), len(sysu)])
    for name in ("pid", "tracklet", "camid"):
        known = [set(joint[name][(parts == k) & (joint[name] >= 0)]) for k in range(3)]
        assert not (known[0] & known[1] or known[0] & known[2] or known[1] & known[2])
        for k, table in enumerate((one, two, sysu)):                       # within a set who is who stays
            mine = joint[parts == k]
            if name == "camid": continue
            assert (pd.factorize(mine[name])[0] == pd.factorize(table[name])[0]).all()
            assert ((mine[name] < 0).to_numpy() == (table[name] < 0).to_numpy()).all()
    assert set(joint.video) == {"a/MOT17-02", "a/MOT17-04", "b/MOT17-02", "b/MOT17-04", ""}
    assert "galleries" not in joint.attrs and "galleries" not in joint.attrs["parts"]["c"]
    with pytest.raises(ValueError, match="img1/000001.jpg: its rows have video 'a/MOT17-02' and 'b/MOT17-02'"):
        join_scenes(dict(a=one, b=one))


def test_names_that_no_frames_bear(tmp_path):
    assert [n for n, f in DATASETS.items() if f.shows == "frames"] == list(SCENE_READERS) == scene_sets_of(
        ",".join(SCENE_READERS)) and not set(SCENE_READERS) & set(data_sets())
    def read(subset="frames", **asked): return read_data(dict(data_root=str(tmp_path)) | asked, subset)
    for asked, words in ((dict(data="market1501"), "'market1501' is not known.*or name a scenes .parquet, or a wor"),
                         (dict(data="coco,croudhuman"), "did you mean 'crowdhuman'"),
                         (dict(data=""), "'' is not known"),
                         (dict(data="prw,prw"), "'prw,prw' names a data set twice"),
                         (dict(data="prw,coco", data_root=None), "the folder that holds prw and coco"),
                         (dict(data="prw", annotation="a.json"), "is of coco or crowdhuman, alone, not of 'prw'"),
                         (dict(data="prw", subset="train"), "'prw' holds whole frames with boxes, no crops")):
        with pytest.raises(ValueError, match=words): read(**asked)
    with pytest.raises(ValueError, match="'coco' holds whole frames"): reader_of("coco")
    for name, words in (("coco", "COCO 2017 .annotations, train2017. not found under"), ("prw", "PRW .*not found"),
                        ("crowdhuman", "CrowdHuman .Images. not found"), ("cuhk_sysu", "CUHK-SYSU .*not found"),
                        ("mot", "there is no gt/gt.txt in it or below")):
        with pytest.raises(FileNotFoundError, match=words): read(data=name)
    for name in ("a", "b"): (tmp_path / name / "coco/annotations").mkdir(parents=True)
    for name in ("a", "b"): (tmp_path / name / "coco/train2017").mkdir()
    with pytest.raises(ValueError, match="COCO 2017 lies in 2 places under .*choose one: root="): read(data="coco")
    with pytest.raises(FileNotFoundError, match="has no annotations/instances_train2017.json: unpack"):
        read(data="coco", data_root=str(tmp_path / "a"))
    (tmp_path / "Images").mkdir()
    with pytest.raises(FileNotFoundError, match="has no annotation_train.odgt or annotations/annotation_train.odgt"):
        read(data="crowdhuman")

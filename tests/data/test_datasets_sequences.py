"""iLIDS-VID and PRID2011: sequences under two cameras, published splits, what is refused."""
import json
import os
import shutil

import numpy as np
import pytest
from examples import put, quiet, warned
from scipy.io import savemat

from cion_nb.core.samples import read_samples, require_whole_tracklets, write_samples
from cion_nb.core.settings import recipe
from cion_nb.data.check import check
from cion_nb.data.datasets import data_sets, read_data, read_ilids_vid, read_prid2011, reader_of
from cion_nb.data.facts import DATASETS, facts_of
from cion_nb.retrieval.protocols import sides, tracklet_rows

PEOPLE = [1, 2, 5, 9, 12, 319]                 # folders have gaps: place 3 is person 5
PLACES = np.array([np.random.default_rng(k).permutation(6) + 1 for k in range(10)])
NAME = "train_test_splits_ilidsvid.mat"


def ilids(above, people=PEOPLE, frames=3, places=PLACES):
    "The archive as it unpacks: i-LIDS-VID/ and the splits beside it; frame numbers of five digits, from 8 on."
    paths = [f"cam{c}/person{p:03d}/cam{c}_person{p:03d}_{f:05d}.png" for c in (1, 2) for p in people
             for f in range(8, 8 + frames)]
    put(above / "i-LIDS-VID/sequences", *paths)
    put(above / "i-LIDS-VID/images", *(f"cam{c}/person{p:03d}/cam{c}_person{p:03d}.png" for c in (1, 2)
                                       for p in people))
    (above / "train-test people splits").mkdir(parents=True)
    savemat(above / "train-test people splits" / NAME, dict(ls_set=places.astype(float)))
    return above


def prid(above, splits=None, both=(1, 2, 3, 4, 5, 6), alone=(201, 202)):
    put(above / "prid_2011/multi_shot", *(f"cam_{c}/person_{p:04d}/{f:04d}.png" for c in "ab" for p in both
                                          for f in (1, 2, 3)), *(f"cam_b/person_{p:04d}/0001.png" for p in alone))
    put(above / "prid_2011/single_shot", *(f"cam_{c}/person_{p:04d}.png" for c in "ab" for p in both))
    splits = splits or [dict(train=["person_0002", "person_0006"], test=["person_0001", "person_0005"]),
                        dict(train=["person_0001", "person_0002"], test=["person_0006", "person_0005"])]
    (above / "splits_prid2011.json").write_text(json.dumps(splits))
    return above


def people(table, split): return set(table.pid[table.split == split])


@pytest.mark.parametrize("split", range(10))
def test_ilids_places_are_folders_in_order(tmp_path, split):
    table = quiet(read_ilids_vid, ilids(tmp_path), split)
    tested = {PEOPLE[place - 1] for place in PLACES[split, :3]}
    assert people(table, "query") == people(table, "gallery") == tested
    assert people(table, "train") == set(PEOPLE) - tested
    assert set(table.camid[table.split == "query"]) == {1} and set(table.camid[table.split == "gallery"]) == {2}
    assert table.groupby("split").tracklet.nunique().to_dict() == dict(train=6, query=3, gallery=3)
    assert table.attrs == dict(dataset="ilids_vid", split=split) and table.tracklet.nunique() == 12
    assert all((tmp_path / p).is_file() for p in table.path) and table.path.is_unique
    assert (table.video == "cam" + table.camid.astype(str)).all()
    require_whole_tracklets(table)


def test_frames_and_folders_are_in_order_whatever_the_disk_says(tmp_path, monkeypatch):
    "Names that sort as text in another order than by number; a disk that lists them backwards."
    home = ilids(tmp_path, frames=1) / "i-LIDS-VID/sequences"
    put(home, *(f"cam1/person005/cam1_person005_{f}.png" for f in (99, 100001, 101)))
    listed = os.scandir
    class Backwards:
        def __init__(self, path="."): self.entries = iter(sorted(listed(path), key=lambda e: e.name)[::-1])
        def __enter__(self): return self
        def __exit__(self, *args): pass
        def __iter__(self): return self
        def __next__(self): return next(self.entries)
        def close(self): pass
    monkeypatch.setattr(os, "scandir", Backwards)
    table = quiet(read_ilids_vid, tmp_path)
    frames = table[(table.pid == 5) & (table.camid == 1)].frame.tolist()
    assert frames == [8, 99, 101, 100001]
    assert table.tracklet.is_monotonic_increasing
    assert table.groupby("tracklet").frame.apply(lambda f: f.is_monotonic_increasing).all()


def test_splits_differ_in_split_alone(tmp_path):
    ilids(tmp_path)
    tables = [quiet(read_ilids_vid, tmp_path, k) for k in range(10)]
    assert all(t.drop(columns="split").equals(tables[0].drop(columns="split")) for t in tables)
    assert len({tuple(sorted(people(t, "query"))) for t in tables}) > 3
    again = read_samples(write_samples(tables[7], tmp_path / "t.parquet"))
    assert again.equals(tables[7]) and again.attrs == dict(dataset="ilids_vid", split=7)


@pytest.mark.parametrize("root, home", [(".", "i-LIDS-VID"), ("i-LIDS-VID", "."), ("..", "iLIDS-VID/i-LIDS-VID")])
def test_ilids_is_found_at_its_folder_and_above(tmp_path, root, home):
    above = ilids(tmp_path / "iLIDS-VID")
    table = quiet(read_ilids_vid, above / root)
    assert all((above / root / p).is_file() for p in table.path)
    assert table.path[0].startswith(f"{home}/sequences/cam1/".removeprefix("./"))
    whole = above / "i-LIDS-VID"
    (above / "train-test people splits" / NAME).rename(whole / NAME)                  # or in the folder itself
    assert quiet(read_ilids_vid, above / root).equals(table)


def drop(*names): return lambda at: [shutil.rmtree(at / "i-LIDS-VID/sequences" / n) for n in names]


def mat(**variables): return lambda at: savemat(at / "train-test people splits" / NAME, variables)


@pytest.mark.parametrize("fault, kind, words", [
    (drop("cam2/person005"), FileNotFoundError,
     "sequences/cam2: 1 person has no frames there: person005; unpack the whole data set"),
    (drop("cam1/person001", "cam1/person319"), FileNotFoundError,
     "cam1: 2 people have no frames.*person001, person319"),
    (drop("cam1/person005", "cam2/person005"), ValueError,
     "sequences holds 5 people, .*ilidsvid.mat counts 6: its numbers are places in the sorted list.*unpack the whole"),
    (lambda at: put(at / "i-LIDS-VID/sequences", *(f"cam{c}/person400/cam{c}_person400_00001.png" for c in (1, 2))),
     ValueError, "sequences holds 7 people"),
    (lambda at: put(at / "i-LIDS-VID/sequences", "cam1/person001/cam2_person001_00009.png"), ValueError,
     "cam1/person001/cam2_person001_00009.png: not named like cam1/person001/cam1_person001_00317.png; take out"),
    (lambda at: put(at / "i-LIDS-VID/sequences", "cam1/a.png", "cam2/b.png"), ValueError, "nor are 1 more"),
    (drop("cam2"), FileNotFoundError, "iLIDS-VID .*sequences/cam2"),
    (lambda at: drop("cam2")(at) and (at / "i-LIDS-VID/sequences/cam2").mkdir(), ValueError, "cam2 holds no image"),
    (lambda at: (at / "train-test people splits" / NAME).unlink(), FileNotFoundError,
     f"{NAME} is neither in .*i-LIDS-VID nor in .*: the splits are defined there, and it comes in the data set"),
    (lambda at: (at / "train-test people splits" / NAME).write_bytes(b"MATLAB 5.0"), ValueError, "no readable MATLAB"),
    (mat(splits=[1]), ValueError, "has no ls_set, but splits"),
    (mat(ls_set=np.r_[PLACES[:3], [[1, 1, 2, 3, 4, 5]]]), ValueError,
     "row 4 of ls_set does not hold each of 1 to 6 once")])
def test_faults_of_ilids_are_named(tmp_path, fault, kind, words):
    fault(ilids(tmp_path / "data"))
    with pytest.raises(kind, match=words): quiet(read_ilids_vid, tmp_path / "data")


@pytest.mark.parametrize("split", [10, -1, "3", True, 2.0, None])
def test_a_split_that_there_is_not(tmp_path, split):
    ilids(tmp_path / "a")
    with pytest.raises(ValueError, match=r"split=.*choose one of .*ilidsvid.mat, 0 to 9"):
        quiet(read_ilids_vid, tmp_path / "a", split)
    prid(tmp_path / "b")
    with pytest.raises(ValueError, match=r"split=.*choose one of .*splits_prid2011.json, 0 to 1"):
        quiet(read_prid2011, tmp_path / "b", split)


@pytest.mark.parametrize("root", [".", "prid_2011", ".."])
def test_prid_is_its_splits_people(tmp_path, root):
    above = prid(tmp_path / "prid2011")
    one, two = (quiet(read_prid2011, above / root, k) for k in (0, 1))
    assert [people(one, s) for s in ("train", "query", "gallery")] == [{2, 6}, {1, 5}, {1, 5}]
    # 3 and 4 are in no split, 201 in one view
    assert people(two, "query") == {5, 6} and set(one.pid) == {1, 2, 5, 6}
    assert set(one.camid[one.split == "query"]) == {0} and set(one.camid[one.split == "gallery"]) == {1}
    assert one.groupby("split").tracklet.nunique().to_dict() == dict(train=4, query=2, gallery=2)
    assert one.groupby("tracklet").frame.apply(list).tolist() == [[1, 2, 3]] * 8
    assert all((above / root / p).is_file() for p in one.path) and not one.path.str.contains("single_shot").any()
    assert one.attrs == dict(dataset="prid2011", split=0)


@pytest.mark.parametrize("splits, kind, words", [
    ([dict(train=["person_0001"], test=["person_0007"])], FileNotFoundError,
     "cam_a: 1 person has no frames.*person_0007"),
    ([dict(train=["person_0201"], test=["person_0001"])], FileNotFoundError,
     "cam_a: 1 person has no frames.*person_0201"),
    ([dict(train=["person_0001"], test=["person_0001"])], ValueError, "person_0001 in train and in test"),
    ([dict(train=["person_0001"])], ValueError, "split 0: expected train and test, each a list"),
    ([dict(train=[1], test=[2])], ValueError, "each a list of folders"),
    (["train"], ValueError, "split 0: expected train"),
    ([dict(train=[], test=[])], ValueError, "each a list of folders"),
    (dict(train=[], test=[]), ValueError, "expected a list of splits")])
def test_faults_of_prids_splits_are_named(tmp_path, splits, kind, words):
    with pytest.raises(kind, match=words): quiet(read_prid2011, prid(tmp_path, splits))


def test_a_list_without_splits_is_told_so(tmp_path):
    home = prid(tmp_path / "a")
    (home / "splits_prid2011.json").write_text("[]")
    with pytest.raises(ValueError, match="splits_prid2011.json lists no splits: take the one"): read_prid2011(home)
    for shape in ((0, 6), (0, 0)):
        home = ilids(tmp_path / f"b{shape[1]}", places=np.zeros(shape))
        with pytest.raises(ValueError, match=f"{NAME} lists no splits"): read_ilids_vid(home)


def test_prid_without_its_splits(tmp_path):
    (prid(tmp_path) / "splits_prid2011.json").unlink()
    words = "splits_prid2011.json is neither in .*prid_2011 nor in .*torchreid's page"
    with pytest.raises(FileNotFoundError, match=words): read_prid2011(tmp_path)


def test_a_recipe_and_the_report_know_them_by_name(tmp_path):
    ilids(tmp_path / "a")
    prid(tmp_path / "b")
    assert {f"{name}_{k}" for name in ("ilids_vid", "prid2011") for k in range(10)} <= set(data_sets())
    # a split must be said
    with pytest.raises(ValueError, match="did you mean 'ilids_vid_.'"): reader_of("ilids_vid")
    asked = recipe("finetune", "tiny", data="ilids_vid_4", data_root=str(tmp_path / "a"))
    table, root = quiet(read_data, asked, "test")
    assert root == tmp_path / "a" and set(table.pid) == {PEOPLE[place - 1] for place in PLACES[4, :3]}
    assert facts_of("ilids_vid_4") is facts_of(table) is DATASETS["ilids_vid"] and table.attrs["split"] == 4
    tracks = tracklet_rows(table)[0]
    query, gallery = sides(tracks, "ilids_vid_4")
    assert (tracks.camid[query] == 1).all() and (tracks.camid[gallery] == 2).all() and len(query) == len(gallery) == 3
    whole, said = warned(reader_of("ilids_vid_0"), tmp_path / "a")
    assert len(said) == 1 and "iLIDS-VID: not the published set" in said[0]
    assert "in all: 36 images, published are 42,460" in said[0]
    report = check(whole, tmp_path / "a", progress=False)
    assert report.title == "iLIDS-VID, 36 images" and "query: 3 tracklets, published are 150" in report.problems
    assert not any("no match" in p for p in report.problems) and any("ten splits" in note for note in report.notes)
    assert "train: 2 people, published are 89" in check(quiet(reader_of("prid2011_1"), tmp_path / "b")).problems


def test_a_whole_set_says_nothing(tmp_path, monkeypatch):
    "Counts as published, on a set made small with its facts."
    from dataclasses import replace
    monkeypatch.setitem(DATASETS, "ilids_vid", replace(
        DATASETS["ilids_vid"], counts=dict.fromkeys(("train", "query", "gallery"), (None, 3)),
        tracklets=dict(train=6, query=3, gallery=3), total=36))
    assert warned(read_ilids_vid, ilids(tmp_path), 9)[1] == []


def test_withdrawn_data_have_no_reader():
    assert not [name for name in [*data_sets(), *DATASETS] if "duke" in name.lower()]
    assert not [facts.home for facts in DATASETS.values() if "duke" in (facts.home + facts.title).lower()]

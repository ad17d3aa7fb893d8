"""Named data sets: where they lie, versions, lists held against the disk, faults by name."""
import json
import shutil

import pytest
from examples import market, paint, put, quiet, warned
from places import DATA

from cion_nb.core.samples import read_folder, read_samples, write_samples
from cion_nb.data import datasets
from cion_nb.data.check import check
from cion_nb.data.datasets import (
    read_cion_al,
    read_cuhk03np,
    read_ltcc,
    read_market1501,
    read_msmt17,
    read_prcc,
    read_viper,
)
from cion_nb.data.facts import facts_of

# ---- readers ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", [".", "market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15"])
def test_market1501(tmp_path, where):
    market(tmp_path / where)
    table = read_market1501(tmp_path)
    assert table.split.tolist() == ["train"] * 2 + ["query"] + ["gallery"] * 2
    assert table.pid.tolist() == [2, 2, 5, 0, 5] and table.camid.tolist() == [1, 2, 1, 3, 6]
    assert table.video[4] == "c6s4" and table.frame[4] == 10001
    assert all((tmp_path / p).is_file() for p in table.path) and table.attrs == dict(dataset="market1501", junk=1)


def test_market1501_strange_name_and_missing_folder(tmp_path):
    market(tmp_path)
    paint(tmp_path / "query" / "someone.jpg")
    with pytest.raises(ValueError, match="someone.jpg: not named like 0002_c1s1"): read_market1501(tmp_path)
    with pytest.raises(FileNotFoundError, match="bounding_box_test"): read_market1501(tmp_path / "query")


def msmt17(root, folders, lists=None):
    for name, pids in (lists or dict(train=[0, 1], val=[1], query=[0, 2], gallery=[0, 1, 2])).items():
        folder, lines = folders[name in ("query", "gallery")], []
        for i, pid in enumerate(pids):
            file = f"{pid:04d}/{pid:04d}_{i:03d}_{i + 3:02d}_0303morning_{i + 15:04d}_{len(name)}.jpg"
            paint(root / folder / file, hash((name, i)) % 1000)
            lines.append(f"{file} {pid}")
        (root / f"list_{name}.txt").write_text("\n".join(lines) + "\n\n")
    return root


@pytest.mark.parametrize("version, folders", datasets._MSMT17_FOLDERS.items())
@pytest.mark.parametrize("where", [".", "MSMT17"])
def test_msmt17_versions_are_told_apart(tmp_path, capsys, version, folders, where):
    msmt17(tmp_path / where, folders)
    table = read_msmt17(tmp_path)
    assert f"MSMT17 {version}" in capsys.readouterr().out
    assert table.split.tolist() == ["train"] * 3 + ["query"] * 2 + ["gallery"] * 3
    assert table.pid.tolist() == [0, 1, 1, 2, 4, 2, 3, 4] and table.camid.tolist() == [3, 4, 3, 3, 4, 3, 4, 5]
    assert table.frame[1] == 16 and table.video[0] == "c03_0303morning"
    assert all((tmp_path / p).is_file() for p in table.path)
    again = read_samples(write_samples(table, tmp_path / "s.parquet"))
    assert again.attrs["version"] == version and f"MSMT17 {version}" in check(again, tmp_path, progress=False).title
    assert f"MSMT17 {version}" in check(again).title and str(check(again)).startswith(f"MSMT17 {version}")


def test_msmt17_faults(tmp_path):
    home = msmt17(tmp_path / "a", ("train", "test"))
    for name in ("train", "val", "query", "gallery"):
        file = home / f"list_{name}.txt"
        text = file.read_text()
        file.unlink()
        with pytest.raises(FileNotFoundError, match=f"list_{name}.txt is missing"): read_msmt17(home)
        file.write_text(text + "0000/none.jpg 0\n")
        with pytest.raises(FileNotFoundError, match="1 of 9 listed images.*none.jpg"): read_msmt17(home)
        file.write_text(text.strip("\n") + "\nno id here\n")
        with pytest.raises(ValueError, match=f"list_{name}.txt, line .*no id here"): read_msmt17(home)
        file.write_text(text)
    msmt17(home, ("mask_train_v2", "mask_test_v2"))
    with pytest.raises(ValueError, match="V1 and V2; choose one"): read_msmt17(home)
    assert read_msmt17(home, version="V1").attrs["version"] == "V1"
    with pytest.raises(FileNotFoundError, match="mask_train_v2"): read_msmt17(tmp_path / "nowhere")


def test_cion_al(tmp_path):
    file = tmp_path / "annos.json"
    file.write_text(json.dumps([dict(id=4, file_path=str(tmp_path / "sec0" / "a.jpg"), score=.5),
                                dict(id=9, file_path="sec1/b.jpg", score=1)]))
    table = read_cion_al(file, tmp_path)
    assert table.path.tolist() == ["sec0/a.jpg", "sec1/b.jpg"] and table.score.tolist() == [.5, 1]
    assert table.attrs == dict(dataset="cion_al")
    for text, words in (("{}", "expected a list"), ("[1]", "entry 0"),
                        ('[{"id": "x", "file_path": "a"}]', "'pid', row 0"), ("[", "not valid JSON"),
                        ('[{"id": 0, "file_path": "/elsewhere/a.jpg"}]', "does not lie under root")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words): read_cion_al(file, tmp_path)
    file.write_text("[]")
    assert len(read_cion_al(file)) == 0


@pytest.mark.slow("real images and clips")
@pytest.mark.skipif(not (DATA / "viper").is_dir(), reason="needs ../shared/data/viper")
def test_viper_is_read_whole():
    table = read_folder(DATA / "viper", r"cam_(?P<camid>[ab])/(?P<pid>\d+)_(?P<angle>\d+)\.bmp")
    assert len(table) == 2 * 632 and table.pid.nunique() == 632 and table.camid.value_counts().tolist() == [632, 632]
    found = check(table, DATA / "viper", progress=False)
    assert "unreadable" not in found.details and "missing" not in found.details


@pytest.mark.parametrize("entries, words", [
    ([dict(id=1, file_path=None)], "entry 0: file_path is None"),
    ([dict(id=True, file_path="a")], "entry 0: id is True"), ([dict(id="p1", file_path="a")], "'pid', row 0: 'p1'"),
    ([dict(id=1, file_path="D:\\a.jpg")], "row 0.*another machine"),
    ([dict(id=1, file_path="a", split="val")], "splits=dict.val"), (dict(train=[]), "keys 'train'"),
    ([dict(image_id=1, img="a")], "columns=dict"), ([dict(id=1, file_path="a", frame="x")], "'frame', row 0")])
def test_annotations_that_are_refused_are_named(tmp_path, entries, words):
    (tmp_path / "a.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="a.json.*" + words): read_cion_al(tmp_path / "a.json")


def test_text_person_annotations_come_back(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps([dict(id=5, file_path="CUHK01\\1.png", split=s, captions=["a man", "a hat"], path="x", camid=None)
                    for s in ("train", "test")]))
    with pytest.warns(UserWarning, match="'path' is kept as path_in_file"): table = read_cion_al(tmp_path / "a.json")
    assert table.path[0] == "CUHK01/1.png" and table.split.tolist() == ["train", "gallery"]
    assert table.camid[0] == -1 and table.attrs["dataset"] == "annotation"
    again = read_samples(write_samples(table, tmp_path / "t.parquet"))
    assert again.captions.tolist() == table.captions.tolist()


# ---- where a data set lies ----------

MARKET = ["bounding_box_train/0002_c1s1_000451_03.jpg", "query/0001_c1s1_001051_00.jpg",
          "bounding_box_test/0001_c2s1_001051_00.jpg", "bounding_box_test/0000_c2s1_001051_00.jpg",
          "bounding_box_test/-1_c2s1_001051_00.jpg"]
LAYOUTS = {
    "market1501": (read_market1501, "Market-1501-v15.09.15", MARKET, "query"),
    "cuhk03np": (lambda root: read_cuhk03np(root, "labeled"), "cuhk03-np",
                 [f"labeled/{f}/000{i}_c1_{i}.png"
                  for i, f in enumerate(("bounding_box_train", "query", "bounding_box_test"))], "labeled/query"),
    "viper": (read_viper, "VIPeR", [f"{c}/{p:03d}_0.bmp" for p in range(4) for c in ("cam_a", "cam_b")], "cam_b"),
    "prcc": (lambda root: read_prcc(root, "other"), "prcc",
             ["rgb/train/001/A_1.jpg", *(f"rgb/test/{c}/002/1.jpg" for c in "ABC")], "rgb/test/C"),
    "ltcc": (read_ltcc, "LTCC_ReID", [f"{f}/001_1_c{i}_000001.png" for i, f in enumerate(("train", "query", "test"))],
             "test")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_set_is_found_one_level_off_and_two_copies_are_refused(tmp_path, capsys, name):
    reader, folder, files, _ = LAYOUTS[name]
    for above in ("a", f"b/{folder}", f"c/{folder}/{folder}", f"d/data/{folder}"): put(tmp_path / above, *files)
    tables = [quiet(reader, tmp_path / at)
              for at in ("a", "b", f"b/{folder}", "c", f"c/{folder}", f"c/{folder}/{folder}", "d", "d/data")]
    for at, t in zip(("a", "b", f"b/{folder}", "c", f"c/{folder}", f"c/{folder}/{folder}", "d", "d/data"), tables):
        assert all((tmp_path / at / p).is_file() for p in t.path)
        assert t.drop(columns="path").equals(tables[0].drop(columns="path"))
    assert capsys.readouterr().out == ""                                        # there was no choice
    # flat and nested: the outer one, and said
    put(tmp_path / f"b/{folder}/{folder}", *files)
    assert not quiet(reader, tmp_path / "b").path.str.startswith(f"{folder}/{folder}").any()
    assert "taken from" in capsys.readouterr().out
    put(tmp_path / f"d/data/{folder} copy", *files)
    for at in ("d/data", "d"):
        with pytest.raises(ValueError, match=f"lies in 2 places under .*{folder} copy.*choose one: root="):
            reader(tmp_path / at)
    inside = tmp_path / "a" / files[0].split("/")[0]
    with pytest.raises(FileNotFoundError, match=f"lies inside the data set: pass root=.*{tmp_path / 'a'}'"):
        reader(inside)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_part_of_a_data_set_is_no_data_set(tmp_path, name):
    reader, _, files, part = LAYOUTS[name]
    table, said = warned(reader, put(tmp_path, *files))
    assert [s.split(" (")[0] for s in said] == [f"{facts_of(table).title}: not the published set"]
    assert any(p.startswith("train: ") and "published are" in p for p in check(table).problems)
    shutil.rmtree(tmp_path / part)
    (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match=f"{part} holds no image"): reader(tmp_path)
    (tmp_path / part).rmdir()
    with pytest.raises(FileNotFoundError, match=f"lacks {part}"): reader(tmp_path)


def test_another_data_set_in_the_same_layout_is_refused(tmp_path):
    put(tmp_path / "other", "bounding_box_train/0001_c2_f0046182.jpg", "query/0005_c2_f0046985.jpg",
        "bounding_box_test/0005_c1_f0046985.jpg")
    with pytest.raises(ValueError, match="other/bounding_box_train/0001_c2_f0046182.jpg: not named like .*take out"):
        read_market1501(tmp_path)
    put(tmp_path / "Market-1501", *MARKET)
    assert len(quiet(read_market1501, tmp_path)) == 4  # the one that bears the name


def msmt(home, version, ends="jpg", mark=""):
    train, test = dict(V1=("train", "test"), V2=("mask_train_v2", "mask_test_v2"))[version]
    for name, folder in dict(train=train, val=train, query=test, gallery=test).items():
        i = ["train", "val", "query", "gallery"].index(name)
        file = f"000{i % 2}/000{i % 2}_00{i}_0{i + 1}_0303morning_0015_0"
        put(home / folder, f"{file}.{ends}")
        (home / f"list_{name}.txt").write_bytes(
            (mark + file.replace("/", "\\" if mark else "/") + f".jpg {i % 2}\r\n").encode())
    return home


def test_msmt17_versions_side_by_side(tmp_path, capsys):
    msmt(tmp_path / "MSMT17_V1", "V1")
    msmt(tmp_path / "MSMT17_V2" / "MSMT17_V2", "V2", mark="\ufeff")
    with pytest.raises(ValueError, match="V1 and V2; choose one by version='V1' or 'V2': .*MSMT17_V1, .*MSMT17_V2"):
        read_msmt17(tmp_path)
    one, two = (quiet(read_msmt17, tmp_path, version=v) for v in ("V1", "V2"))
    assert one.path[0].startswith("MSMT17_V1/train/")
    assert two.path[0].startswith("MSMT17_V2/MSMT17_V2/mask_train_v2/0000/") and one.pid.equals(two.pid)
    assert all((tmp_path / p).is_file() for t in (one, two) for p in t.path)
    assert (two.attrs["version"], two.attrs["unlisted"]) == ("V2", 0)
    with pytest.raises(ValueError, match="MSMT17_V1 holds MSMT17 V1, not V2"):
        read_msmt17(tmp_path / "MSMT17_V1", version="V2")
    with pytest.raises(ValueError, match="choose V1 or V2"): read_msmt17(tmp_path, version="v3")
    with pytest.raises(FileNotFoundError, match="lies inside the data set: pass root=.*MSMT17_V1'"):
        read_msmt17(tmp_path / "MSMT17_V1" / "train")
    shutil.copytree(tmp_path / "MSMT17_V1", tmp_path / "msmt17-small")
    with pytest.raises(ValueError, match="MSMT17 V1 lies in 2 places"): read_msmt17(tmp_path, version="V1")
    msmt(tmp_path / "x" / "MSMT17_V2", "V1")
    assert any("is MSMT17 V1 by its folders" in text for text in warned(read_msmt17, tmp_path / "x")[1])


def test_msmt17_lists_against_the_disk(tmp_path):
    home = msmt(tmp_path / "MSMT17", "V1")
    put(home, "train/0009/0009_000_01_0303morning_0015_0.jpg", "test/a.png")
    table, said = warned(read_msmt17, home)
    assert table.attrs["unlisted"] == 2
    assert any("2 images are in no list and left out: test/a.png" in s for s in said)
    assert "2 images on disk in no list, left out" in check(table).notes
    with pytest.raises(FileNotFoundError, match="4 of 4 listed images.*4 are there with another ending"):
        read_msmt17(msmt(tmp_path / "b" / "MSMT17", "V1", ends="jpeg"))
    for prefix in ("./", "test/", "./test/"):
        (home / "list_query.txt").write_text(f"{prefix}0000/0000_002_03_0303morning_0015_0.jpg 0\n")
        assert quiet(read_msmt17, home).path.tolist() == table.path.tolist()
    (home / "list_query.txt").write_text("\n")
    with pytest.raises(ValueError, match="list_query.txt lists no image"): read_msmt17(home)


@pytest.mark.slow("real images and clips")
@pytest.mark.skipif(not (DATA / "viper").is_dir(), reason="needs ../shared/data/viper")
def test_viper_is_whole_and_says_nothing():
    table, said = warned(read_viper, DATA)
    assert said == [] and check(table).ok and 0 in set(table.pid)

"Readers, images and the data report: bad input, rare modes, round trips."
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from cion_nb import samples as S
from cion_nb.samples import (COLUMNS, UnreadableImage, as_samples, check, make_samples, open_image, read_cion_al, read_csv,
                             read_folder, read_market1501, read_msmt17, read_samples, read_tracklets, write_samples)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def paint(path, seed=0, size=(8, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)


# ---- the table -------------------------------------------------------------------------------------------------

ids = st.integers(-1, 2**62)
rows = st.lists(st.tuples(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=8), ids, st.integers(-1, 2**15 - 1),
                          st.integers(-1, 2**31 - 1), st.sampled_from(S.SPLITS)), max_size=12)


@given(rows, st.sampled_from([None, "dataset"]))
@settings(max_examples=60, deadline=None)
def test_round_trip_keeps_rows_dtypes_and_attrs(tmp_path_factory, rows, attr):
    path, pid, camid, frame, split = (list(c) for c in zip(*rows)) if rows else ([],) * 5
    table = make_samples(path, pid, camid, frame=frame, split=split, score=np.arange(len(path)) / 7)
    if attr: table.attrs = {attr: "x", "n": 3}
    again = read_samples(write_samples(table, tmp_path_factory.mktemp("t") / "s.parquet"))
    pd.testing.assert_frame_equal(table, again)
    assert again.attrs == table.attrs
    assert list(again.dtypes[list(COLUMNS)].astype(str)) == list(COLUMNS.values())


@pytest.mark.parametrize("change, words", [
    (dict(pid=[1, None]), "column 'pid', row 1"), (dict(pid=["1", "x"]), "column 'pid', row 1: 'x'"), (dict(pid=-2), "column 'pid', row 0"),
    (dict(camid=2**15), "int16"), (dict(frame=2**31), "int32"), (dict(frame=.5), "column 'frame', row 0"), (dict(pid=[1, float("inf")]), "row 1"),
    (dict(split=["train", "valid"]), "column 'split', row 1: 'valid'"), (dict(video=["a", None]), "column 'video', row 1"),
    (dict(video=["a", "b"], tracklet=0), "unique over all videos"), (dict(pid=[1, 2, 3]), "'pid' has 3 rows, 'path' has 2")])
def test_bad_columns_are_named(change, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make_samples(["a.jpg", "b.jpg"], **change)


def test_as_samples_orders_columns_numbers_rows_and_keeps_large_ids():
    table = make_samples([Path("a") / "b.jpg", "c.jpg", "d.jpg"], pid=[2**62 + 1, 3, 3], split="train", extra=["x", "y", "z"])
    assert table.pid[0] == 2**62 + 1 and table.path[0] == "a/b.jpg"
    part = as_samples(table[["extra", *reversed(COLUMNS)]].iloc[1:])
    assert part.columns.tolist() == [*COLUMNS, "extra"] and part.index.tolist() == [0, 1]
    with pytest.raises(ValueError, match="path.*row 1: empty"): make_samples(["a", ""])
    with pytest.raises(ValueError, match="no column path, tracklet"): as_samples(table.drop(columns=["path", "tracklet"]))
    before = table.copy(); as_samples(table); pd.testing.assert_frame_equal(before, table)


def test_large_integer_ids_given_as_text_stay_exact():
    assert make_samples(["a", "b"], pid=[str(2**62 + 1), "-1"]).pid.tolist() == [2**62 + 1, -1]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_samples(make_samples(["a.jpg"]), tmp_path / "s.parquet")
    def fail(self, where, **kwargs):
        Path(where).write_bytes(b"half"); raise OSError("disk full")
    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(OSError, match="disk full"): write_samples(make_samples(["b.jpg"]), path)
    assert os.listdir(tmp_path) == ["s.parquet"] and read_samples(path).path[0] == "a.jpg"
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~S._umask())


# ---- images ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("L", "jpg"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("CMYK", "tif"),
                                          ("YCbCr", "jpg"), ("I;16", "png"), ("I;16", "tif"), ("I", "tif"), ("RGB", "bmp"), ("RGB", "webp"), ("L", "ppm")])
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    if mode in ("I;16", "I"): image = Image.fromarray(np.full((16, 8), 128 * 257, {"I": np.int32}.get(mode, np.uint16)))
    else: image = Image.new("RGB", (8, 16), (128, 128, 128)).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    seen = open_image(tmp_path / f"x.{suffix}")
    assert seen.mode == "RGB" and seen.size == (8, 16)
    assert abs(np.asarray(seen).mean() - 128) < (130 if mode == "1" else 4)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, turn):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1))
    there = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]                     # the transposition that a viewer undoes
    exif = Image.Exif(); exif[0x0112] = turn
    (picture if there is None else picture.transpose(there)).save(tmp_path / "x.png", exif=exif)
    seen = open_image(tmp_path / "x.png")
    assert seen.size == (64, 128) and (np.asarray(seen) == np.asarray(picture)).all()
    assert S.to_rgb(seen).size == seen.size                                              # turned once


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
def test_a_file_cut_anywhere_is_whole_or_unreadable(tmp_path, suffix):
    paint(tmp_path / f"x.{suffix}", size=(16, 32))
    data, whole = (tmp_path / f"x.{suffix}").read_bytes(), np.asarray(open_image(tmp_path / f"x.{suffix}"))
    unreadable = 0
    for n in np.linspace(0, len(data) - 1, 40).astype(int):
        (tmp_path / "cut").write_bytes(data[:n])
        try: np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "cut")), whole)
        except UnreadableImage as e: unreadable += 1; assert e.reason and e.path.endswith("cut")
    assert unreadable >= 37  # the very end of a file may carry no pixels


def test_unreadable_images_say_why_and_cross_processes(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    (tmp_path / "dir.jpg").mkdir()
    for name, why in (("f.tif", "floating-point"), ("dir.jpg", "directory"), ("none.jpg", "no such file")):
        with pytest.raises(UnreadableImage, match=why): open_image(tmp_path / name)
    e = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "zero bytes")))
    assert isinstance(e, OSError) and (e.path, e.reason, str(e)) == ("a.jpg", "zero bytes", "a.jpg: zero bytes")


# ---- readers ---------------------------------------------------------------------------------------------------

def market(root):
    for folder, names in dict(bounding_box_train=["0002_c1s1_000451_03.jpg", "0002_c2s3_000001_01.jpg"], query=["0005_c1s1_000001_00.jpg"],
                              bounding_box_test=["-1_c1s1_000401_03.jpg", "0000_c3s1_000001_01.jpg", "0005_c6s4_010001_01.jpg"]).items():
        for i, name in enumerate(names): paint(root / folder / name, i)
        (root / folder / "Thumbs.db").touch()
    return root


@pytest.mark.parametrize("where", [".", "market1501", "Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15"])
def test_market1501(tmp_path, where):
    market(tmp_path / where)
    table = read_market1501(tmp_path)
    assert table.split.tolist() == ["train"] * 2 + ["query"] + ["gallery"] * 2
    assert table.pid.tolist() == [2, 2, 5, 0, 5] and table.camid.tolist() == [1, 2, 1, 3, 6] and table.video[4] == "c6s4" and table.frame[4] == 10001
    assert all((tmp_path / p).is_file() for p in table.path) and table.attrs == dict(dataset="market1501", junk=1)


def test_market1501_strange_name_and_missing_folder(tmp_path):
    market(tmp_path); paint(tmp_path / "query" / "someone.jpg")
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


@pytest.mark.parametrize("version, folders", S._MSMT17_FOLDERS.items())
@pytest.mark.parametrize("where", [".", "MSMT17"])
def test_msmt17_versions_are_told_apart(tmp_path, capsys, version, folders, where):
    msmt17(tmp_path / where, folders)
    table = read_msmt17(tmp_path)
    assert f"MSMT17 {version}" in capsys.readouterr().out
    assert table.split.tolist() == ["train"] * 3 + ["query"] * 2 + ["gallery"] * 3
    assert table.pid.tolist() == [0, 1, 1, 2, 4, 2, 3, 4] and table.camid.tolist() == [3, 4, 3, 3, 4, 3, 4, 5]
    assert table.frame[1] == 16 and table.video[0] == "c03_0303morning" and all((tmp_path / p).is_file() for p in table.path)
    again = read_samples(write_samples(table, tmp_path / "s.parquet"))
    assert again.attrs["version"] == version and f"MSMT17 {version}" in check(again, tmp_path, progress=False).title
    assert f"MSMT17 {version}" in check(again).title and str(check(again)).startswith(f"MSMT17 {version}")


def test_msmt17_faults(tmp_path):
    home = msmt17(tmp_path / "a", ("train", "test"))
    for name in ("train", "val", "query", "gallery"):
        file = home / f"list_{name}.txt"; text = file.read_text()
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
    file.write_text(json.dumps([dict(id=4, file_path=str(tmp_path / "sec0" / "a.jpg"), score=.5), dict(id=9, file_path="sec1/b.jpg", score=1)]))
    table = read_cion_al(file, tmp_path)
    assert table.path.tolist() == ["sec0/a.jpg", "sec1/b.jpg"] and table.score.tolist() == [.5, 1] and table.attrs == dict(dataset="cion_al")
    for text, words in (("{}", "expected a list"), ("[1]", "entry 0"), ('[{"id": "x", "file_path": "a"}]', "'pid', row 0"), ("[", "not valid JSON"),
                        ('[{"id": 0, "file_path": "/elsewhere/a.jpg"}]', "does not lie under root")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words): read_cion_al(file, tmp_path)
    file.write_text("[]"); assert len(read_cion_al(file)) == 0


def test_tracklets(tmp_path):
    for name in ("day1/cam2/t1/000010.jpg", "day1/cam2/t1/000009.jpg", "day1/cam2/t2/a.jpg", "day1/cam2/t2/b.jpg", "v/t1/x_20201121123456789.jpg", "v/t10/1_7.jpg", "v/t9/0007.jpg", "v/t9/7.png"):
        paint(tmp_path / name)
    table = read_tracklets(tmp_path)
    assert table.video.tolist() == ["day1/cam2"] * 4 + ["v"] * 4
    assert table.tracklet.tolist() == [0, 0, 1, 1, 2, 3, 3, 4] and table.tracklet_name.tolist() == ["t1", "t1", "t2", "t2", "t1", "t9", "t9", "t10"]
    assert table.frame.tolist() == [9, 10, 0, 1, 0, 0, 1, 7]   # a date too long for int32, and 7 twice: positions
    with pytest.raises(ValueError, match="2 images lie in no tracklet folder"): read_tracklets(tmp_path / "v" / "t9")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"): read_tracklets(tmp_path / "empty")


def test_read_folder_patterns(tmp_path):
    for name in ("train/0001/c2_f0010_x.jpg", "train/0012/c1_f0002_y.jpg", "test/-1/c12_f0003_zz.jpg"): paint(tmp_path / name)
    table = read_folder(tmp_path, "{split}/{pid}/c{camid}_f{frame}_*.jpg")
    assert table.split.tolist() == ["gallery", "train", "train"] and table.pid.tolist() == [-1, 1, 12] and table.camid.tolist() == [12, 2, 1] and table.frame.tolist() == [3, 10, 2]
    assert read_folder(tmp_path, "**/c{camid}*.jpg").camid.tolist() == [12, 2, 1]   # digits are taken whole
    assert read_folder(tmp_path, "{split}/{pid}/{kind}_f*_{mark}.jpg", splits={"test": "query"}).mark.tolist() == ["zz", "x", "y"]
    with pytest.raises(ValueError, match="'split', row 0: 'test'"): read_folder(tmp_path, "{split}/**.jpg", splits={"test": "test"})
    with pytest.raises(ValueError, match="none of 3 images"): read_folder(tmp_path, "{pid}/{frame}.jpg")
    with pytest.raises(ValueError, match="is no field name"): read_folder(tmp_path, "{path}")
    with pytest.raises(FileNotFoundError): read_folder(tmp_path / "none", "*")


def test_read_csv(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("path;pid;camid;frame;split;box w\n a.jpg ;7;;3;train;1.5\nb.jpg;;2;;;\n")
    table = read_csv(file, sep=";")
    assert table.pid.tolist() == [7, -1] and table.camid.tolist() == [-1, 2] and table.split.tolist() == ["train", ""] and np.isnan(table["box w"][1])
    file.write_text("path,video\n/x/a.jpg,NA\n"); assert read_csv(file).video[0] == "NA"   # a video may be called NA
    with pytest.raises(ValueError, match="does not lie under root"): read_csv(file, tmp_path)
    file.write_text("path\n\n"); assert len(read_csv(file)) == 0
    file.write_text("path,pid\na.jpg,1.5\n")
    with pytest.raises(ValueError, match=r"column 'pid', row 0: '1.5'"): read_csv(file)
    with pytest.raises(ValueError, match="no column 'who'"): read_csv(file, columns=dict(pid="who"))
    (tmp_path / "in").mkdir(); paint(tmp_path / "in" / "a.jpg")
    file.write_text(f"path,pid\n{tmp_path}/in/a.jpg,4\n"); assert read_csv(file, tmp_path / "in").path.tolist() == ["a.jpg"]


# ---- the report ------------------------------------------------------------------------------------------------

def test_check_finds_each_fault_and_nothing_else(tmp_path):
    names = [f"{i}.png" for i in range(8)]
    for i, n in enumerate(names): paint(tmp_path / n, i)
    table = make_samples(names, pid=[1, 1, 2, 2, 3, 4, 3, 4], camid=[1, 2, 1, 2, 1, 1, 2, 2], split=["train"] * 4 + ["query"] * 2 + ["gallery"] * 2)
    clean = check(table, tmp_path, progress=False)
    assert clean.ok and not clean.notes and clean.counts.loc["train"].tolist() == [4, 2, 2, 0] and "no problem" in str(clean)
    def problems(t, **kw): return check(t, tmp_path, progress=False, **kw).problems
    assert "1 person is in train and in test: 3" in problems(table.assign(pid=[3, 3, 2, 2, 3, 4, 3, 4]))[0]
    assert "1 query has no match in another camera; people: 4" in problems(table.assign(camid=[1, 2, 1, 2, 1, 1, 2, 1]))[0]
    assert problems(table.assign(camid=-1)) == []                    # unknown cameras: every image may be another camera's
    single = check(table.assign(camid=[1, 1, 1, 2, 1, 1, 2, 2]), tmp_path, progress=False)
    assert single.ok and single.notes == ["1 person is seen by one camera only: 1"]
    paint(tmp_path / "1.png", 0); paint(tmp_path / "6.png", 0)         # inside train: a note; in the gallery too: a problem, under another person
    found = check(table, tmp_path, progress=False)
    assert [p.split(":")[0] for p in found.problems] == ["1 picture is in two splits", "1 picture has two person ids"]
    assert found.notes[0].startswith("1 picture is stored more than once") and set(found.details["across_splits"].path) == {"0.png", "1.png", "6.png"}
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60]); (tmp_path / "3.png").write_bytes(b""); (tmp_path / "4.png").unlink()
    found = check(table, tmp_path, progress=False)
    assert found.details["missing"] == ["4.png"] and found.details["unreadable"].index.tolist() == ["2.png", "3.png"]
    assert check(table, tmp_path, decode=False, progress=False).details["unreadable"].index.tolist() == ["3.png"]
    assert "published" not in str(found) and found._repr_html_().count("<li>") == len(found.problems) + len(found.notes)
    assert check(table).ok and "not looked at" in check(table).title


def test_check_counts_and_html_escape(tmp_path):
    market(tmp_path); table = read_market1501(tmp_path)
    found = check(table, tmp_path, progress=False)
    assert found.problems[0] == "train: 2 images, published are 12,936" and not found.ok
    assert found.counts.loc["gallery", "people"] == 1 and found.counts.loc["gallery", "published images"] == 15913
    assert check(table, tmp_path, published=False, progress=False).counts.shape == (3, 4)
    strange = check(make_samples(["<b>.jpg"]), tmp_path, progress=False)
    assert "&lt;b&gt;" in strange._repr_html_() and "<b>.jpg" not in strange._repr_html_()


def test_check_of_many_files_and_of_none(tmp_path):
    for i in range(4100): (tmp_path / f"{i}.jpg").write_bytes(b"%d" % (i % 4099))   # more than one chunk of the pool
    found = check(make_samples([f"{i}.jpg" for i in range(4100)]), tmp_path, decode=False, progress=False)
    assert found.ok and found.details["duplicates"].path.tolist() == ["0.jpg", "4099.jpg"]
    assert check(make_samples([]), tmp_path, progress=False).ok and "0 images" in str(check(make_samples([])))
    again = check(make_samples(["0.jpg", "0.jpg"], split=["query", "gallery"], pid=1), tmp_path, decode=False, progress=False)
    assert any("1 path is in the table more than once" in p for p in again.problems) and any("two splits" in p for p in again.problems)
    with pytest.raises(FileNotFoundError, match="no folder"): check(make_samples([]), tmp_path / "none")


@pytest.mark.skipif(not (DATA / "viper").is_dir(), reason="needs ../shared/data/viper")
def test_viper_is_read_whole():
    table = read_folder(DATA / "viper", r"cam_(?P<camid>[ab])/(?P<pid>\d+)_(?P<angle>\d+)\.bmp")
    assert len(table) == 2 * 632 and table.pid.nunique() == 632 and table.camid.value_counts().tolist() == [632, 632]
    found = check(table, DATA / "viper", progress=False)
    assert "unreadable" not in found.details and "missing" not in found.details


def test_a_table_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no samples table at .*gone.parquet"): read_samples(tmp_path / "gone.parquet")
    write_samples(make_samples(path=["a.jpg"]), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    for damaged in (b"", b"PAR1", whole[:-9], whole[:40] + b"\0" * 20 + whole[60:-30] + b"\0" * 22 + whole[-8:]):
        (tmp_path / "t.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match="t.parquet is no readable samples table"): read_samples(tmp_path / "t.parquet")

"Readers, images and the data report: bad input, rare modes, round trips."
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from cion_nb.core import images
from cion_nb.core import samples as S
from cion_nb.data import datasets
from cion_nb.core.images import open_image, to_rgb, UnreadableImage
from cion_nb.core.samples import (
    as_samples, COLUMNS, make_samples, read_csv, read_folder, read_samples, read_tracklets, write_samples)
from cion_nb.data.datasets import read_cion_al, read_market1501, read_msmt17
from cion_nb.data.check import check

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
    assert to_rgb(seen).size == seen.size                                              # turned once


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


@pytest.mark.parametrize("version, folders", datasets._MSMT17_FOLDERS.items())
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


# ---- files as people have them ---------------------------------------------------------------------------------

@pytest.mark.parametrize("names, frames, said", [
    (["000001_0.93", "000002_0.87", "000003_0.87"], [1, 2, 3], ""), (["f000010_x120_y44_w30_h90", "f000011_x121_y44_w31_h88"], [10, 11], ""),
    (["0001C1T0001F001", "0001C1T0001F002"], [1, 2], ""), (["0001_C1_F0001_X94071", "0001_C1_F0002_X94083"], [1, 2], ""),
    (["000007_128x64", "000008_128x65", "000009_130x63"], [7, 8, 9], ""), (["0002_c1s1_000451_03", "0002_c1s1_000551_01"], [451, 551], ""),
    (["0002_c1s1_000451_01", "0002_c1s1_000551_02"], [451, 551], "451 or 01; 000451 is taken"), (["cam1.0451", "cam1.0452"], [451, 452], ""),
    (["000001", "000002", "000002 (1)"], [0, 2, 1], "no number of the names grows"),
    (["2024-05-01_10-00-01", "2024-05-01_10-00-02", "2024-05-01_10-01-00"], [0, 1, 2], "no number of the names grows"),
    (["000002_right", "000001_left"], [1, 2], ""), (["7", "9", "8"], [7, 8, 9], "")])
def test_the_field_that_is_the_frame(tmp_path, recwarn, names, frames, said):
    for n in names: paint(tmp_path / "v" / "t1" / f"{n}.jpg")
    table = read_tracklets(tmp_path)
    found = dict(zip((Path(p).stem for p in table.path), table.frame))
    assert sorted(found.values()) == sorted(frames) and [found[n] for n in sorted(found)] == [dict(zip(sorted(names), frames))[n] for n in sorted(found)]
    assert said in " ".join(str(w.message) for w in recwarn) and bool(said) == bool(len(recwarn))


def test_one_odd_tracklet_does_not_change_the_others(tmp_path):
    for t in range(4):
        for f in (9, 10): paint(tmp_path / f"t{t}" / f"{f:04d}_{10 * f % 7}.jpg")
    paint(tmp_path / "t3" / "0009_9.png")
    with pytest.warns(UserWarning, match="in 1 of 4 tracklets"): table = read_tracklets(tmp_path)
    assert table.frame.tolist() == [9, 10] * 3 + [0, 1, 2] and table.attrs["positions"] == 1
    assert any("positions" in n for n in check(table, tmp_path, progress=False).notes)
    with pytest.warns(UserWarning, match="1 image repeats a frame"): assert read_tracklets(tmp_path, pattern="{frame}_*").frame.max() == 10
    with pytest.raises(ValueError, match="no {frame}"): read_tracklets(tmp_path, pattern="{pid}_*")


def test_images_of_every_ending_are_read_or_counted(tmp_path):
    for s in (".jpg", ".JPEG", ".jpe", ".jfif", ".PNG", ".gif", ".tif", ".webp"): (tmp_path / "v/t").mkdir(parents=True, exist_ok=True); (tmp_path / f"v/t/{len(s)}{s[1:]}_1{s}").touch()
    for s in ("0_1.heic", "0_2.HEIC", "0_3.mp4", "Thumbs.db", ".DS_Store", "notes.txt"): (tmp_path / "v/t" / s).touch()
    (tmp_path / "__MACOSX").mkdir(); (tmp_path / "__MACOSX" / "x.jpg").touch()
    with pytest.warns(UserWarning, match=r"3 files left out: 2 .heic, 1 .mp4 \(convert it to JPEG, or install pillow-heif"): table = read_folder(tmp_path, "**/*_{frame}.*")
    assert len(table) == 8 and table.attrs["left_out"] == {".heic": 2, "hidden": 2, ".mp4": 1, ".db": 1, ".txt": 1}
    (tmp_path / "h").mkdir(); (tmp_path / "h/a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    for read in (read_tracklets, lambda r: read_folder(r, "*")):
        with pytest.raises(ValueError, match="no images.*1 .heic"): read(tmp_path / "h")
    with pytest.raises(UnreadableImage, match="pillow-heif"): open_image(tmp_path / "h/a.heic")


def test_links_are_followed_once_and_real_folders_win(tmp_path):
    paint(tmp_path / "z/t/1.jpg"); (tmp_path / "a").symlink_to(tmp_path / "z"); (tmp_path / "out").mkdir()
    paint(tmp_path.parent / f"{tmp_path.name}-other" / "2.jpg"); (tmp_path / "out/there").symlink_to(tmp_path.parent / f"{tmp_path.name}-other")
    assert images.list_images(tmp_path) == ["out/there/2.jpg", "z/t/1.jpg"]


def test_names_that_are_no_utf8_are_shown(tmp_path):
    os.makedirs(os.path.join(os.fsencode(tmp_path), b"caf\xe9")); paint(tmp_path / "ok/1.jpg")
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9", b"1.jpg"), "wb"): pass
    for read in (read_tracklets, lambda r: read_folder(r, "*/{frame}.jpg")):
        with pytest.raises(ValueError, match=r"1 file name is no UTF-8: 'caf\\xe9/1.jpg'; .*convmv.*unzip -O"): read(tmp_path)
    for column in (dict(path=["a", "\udce9"]), dict(path=["a", "b"], video=["a", "\udce9"])):
        with pytest.raises(ValueError, match=r"row 1: '\\xe9' is no UTF-8"): make_samples(**column)


@pytest.mark.parametrize("names, pids, said", [
    (["-1", "0000", "0002"], [-1, 0, 2], ""), (["00-1", "-1", "0000", "0002"], [-1, -1, 0, 2], "'00-1' is read as -1"), (["alice", "bob"], [1, 2], ""),
    (["alice", "-1"], [1, -1], ""), (["0007", "bob", "0002"], [7, 8, 2], "1 word among the numbers of pid"), (["7", "007"], [7, 7], "are one number")])
def test_numbers_stay_numbers(tmp_path, recwarn, names, pids, said):
    for n in names: paint(tmp_path / n / "1.jpg")
    table = read_folder(tmp_path, r"(?P<pid>[^/]+)/1\.jpg")
    assert dict(zip((p.split("/")[0] for p in table.path), table.pid)) == dict(zip(names, pids))
    assert said in " ".join(str(w.message) for w in recwarn) and bool(said) == bool(len(recwarn))


@pytest.mark.parametrize("pattern", ["{pid}C{camid}T{tracklet}F{frame}.jpg", "{pid}C{camid}T{tracklet}F*.jpg"])
def test_a_tracklet_counts_within_its_camera_and_person(tmp_path, pattern):
    for p in (1, 2):
        for c in (1, 2):
            for f in (1, 2): paint(tmp_path / f"{p:04d}C{c}T0001F{f:03d}.jpg")
    with pytest.warns(UserWarning, match="numbered anew"): table = read_folder(tmp_path, pattern)
    assert table.groupby("tracklet").size().tolist() == [2] * 4 and set(table.tracklet_name) == {"1"}
    with pytest.warns(UserWarning, match="'person' could mean pid"): read_folder(tmp_path, "{person}C*")
    with pytest.raises(ValueError, match="pattern '{pid}_{pid}'"): read_folder(tmp_path, "{pid}_{pid}")


TABLES = {"windows": ("path,pid\r\nsec0\\a.jpg,1\r\n\r\nsec0\\b.jpg,2\r\n", "utf-8-sig", {}), "semicolon": ("path;pid;s\nsec0/a.jpg;1;0,5\nsec0/b.jpg;2;1\n;;\n", "utf-8", {}),
          "tab": ("path\tpid\nsec0/a.jpg \t1.0\nsec0/b.jpg\t2\n", "utf-8", {}), "bar": ("pid|path\n1|./sec0/a.jpg\n2|sec0//b.jpg", "utf-8", {}), "excel": ("sep=;\n path ;pid\n sec0/a.jpg;001\nsec0/b.jpg;2,0\n", "utf-8", {}),
          "quotes": ('"path";"pid"\n"sec0/a.jpg";"1"\n"sec0/b.jpg";"2"\n', "utf-8", {}), "drive": ("path,pid\nD:\\d\\sec0\\a.jpg,1\nd:/D\\sec0/b.jpg,2\n", "utf-8", dict(prefix="D:\\d")),
          "share": ("path,pid\n\\\\nas\\d\\sec0\\a.jpg,1\n\\\\nas\\d\\sec0\\b.jpg,2\n", "utf-8", dict(prefix="\\\\nas\\d")), "names": ("file,id\nsec0/a.jpg,1\nsec0/b.jpg,2\n", "utf-8", dict(columns=dict(path="file", pid="id")))}

@pytest.mark.parametrize("name", TABLES)
def test_tables_from_other_hands(tmp_path, name):
    text, encoding, options = TABLES[name]
    for n in "ab": paint(tmp_path / f"sec0/{n}.jpg")
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    table = read_csv(tmp_path / "t.csv", tmp_path, **options)
    assert table.path.tolist() == ["sec0/a.jpg", "sec0/b.jpg"] and table.pid.tolist() == [1, 2]
    if "s" in table: assert table.s.tolist() == [.5, 1]


@pytest.mark.parametrize("text, words", [
    ("path,pid\nD:\\x\\sec0\\a.jpg,1\n", "prefix='D:/x' cuts off"), ("path,pid\n\\\\nas\\a.jpg,1\n", "another machine"), ("path,pid\nsec0/A.JPG,1\n", "on disk: 'sec0/a.jpg'"),
    ("path,pid\nimages/sec0/a.jpg,1\n", "there is sec0/a.jpg"), ("path,pid\nsec0/a.jpg,1,2\n", "line 2: 3 cells"), ("path,pid\nsec0/a.jpg\n", "line 2: 1 cell "), ("path,pid,pid\na,1,2\n", "'pid' appears twice"),
    ("path,pid\nsec0/a.jpg,1.23E+15\n", "not a whole number"), ("", "is empty"), ("img,pid\na,1\n", "columns=dict.path='img'"), ("path,split\nsec0/a.jpg,val\n", r"splits=dict.val='train'"),
    ("path,camid,tracklet\nsec0/a.jpg,1,1\nsec0/a.jpg,2,1\n", "two cameras"), ("path,video,tracklet\nsec0/a.jpg,u,1\nsec0/a.jpg,v,1\n", "unique over all videos")])
def test_tables_that_are_refused_are_named(tmp_path, text, words):
    paint(tmp_path / "sec0/a.jpg"); (tmp_path / "t.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match="t.csv.*" + words): read_csv(tmp_path / "t.csv", tmp_path)


def test_other_encodings_and_files_name_their_remedy(tmp_path):
    file = tmp_path / "t.csv"
    for data, words in (("path,pid\n人.jpg,1\n".encode("gbk"), "iconv"), ("path,pid\na,1\n".encode("utf-16"), "iconv -f UTF-16"), (b"PK\x03\x04", "Excel"), (b"\x1f\x8b", "gzip")):
        file.write_bytes(data)
        for read in (read_csv, read_cion_al):
            with pytest.raises(ValueError, match=f"t.csv is .*{words}"): read(file)
    with pytest.raises(ValueError, match="is a folder; name one file, of t.csv"): read_csv(tmp_path)
    file.write_text("path,person\na,1\n")
    with pytest.warns(UserWarning, match="'person' could mean pid"): assert read_csv(file).pid.tolist() == [-1]


@pytest.mark.parametrize("entries, words", [
    ([dict(id=1, file_path=None)], "entry 0: file_path is None"), ([dict(id=True, file_path="a")], "entry 0: id is True"), ([dict(id="p1", file_path="a")], "'pid', row 0: 'p1'"), ([dict(id=1, file_path="D:\\a.jpg")], "row 0.*another machine"),
    ([dict(id=1, file_path="a", split="val")], "splits=dict.val"), (dict(train=[]), "keys 'train'"), ([dict(image_id=1, img="a")], "columns=dict"), ([dict(id=1, file_path="a", frame="x")], "'frame', row 0")])
def test_annotations_that_are_refused_are_named(tmp_path, entries, words):
    (tmp_path / "a.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="a.json.*" + words): read_cion_al(tmp_path / "a.json")


def test_remedies_for_tables_can_be_taken_literally(tmp_path):
    (tmp_path / "t.csv").write_text("path,split\na.jpg,train set\n")
    with pytest.raises(ValueError, match=r"splits=\{'train set': 'train'\}"): read_csv(tmp_path / "t.csv")
    assert read_csv(tmp_path / "t.csv", splits={"train set": "train"}).split.tolist() == ["train"]
    (tmp_path / "t.csv").write_text("path,split\na.jpg,class\n")
    with pytest.raises(ValueError, match=r"splits=\{'class': 'train'\}"): read_csv(tmp_path / "t.csv")            # dict(class=...) is no Python
    (tmp_path / "a.json").write_text(json.dumps([dict(id=1, file_path="a.jpg", split=None)]))
    assert read_cion_al(tmp_path / "a.json").split.tolist() == [""]
    (tmp_path / "t.csv").write_text('path,pid\nb.jpg,3\n"a.jpg,1\nc.jpg,2\n')
    with pytest.raises(ValueError, match="t.csv, line 3: .*quotation mark"): read_csv(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("path,pid,group\na.jpg,1,2\n")
    with pytest.warns(UserWarning, match="'person' could mean pid"): read_csv(tmp_path / "t.csv", columns=dict(person="pid"))   # the wrong way round
    with warnings.catch_warnings():
        warnings.simplefilter("error"); assert read_csv(tmp_path / "t.csv", columns=dict(team="group")).team.tolist() == [2]


def test_saved_tables_name_their_file(tmp_path):
    file = tmp_path / "t.parquet"
    pd.DataFrame(dict(a=[1])).to_parquet(file)
    with pytest.raises(ValueError, match="t.parquet: no column path"): read_samples(file)
    make_samples(["a"]).assign(split="val").to_parquet(file)
    with pytest.raises(ValueError, match="t.parquet: column 'split', row 0"): read_samples(file)
    with pytest.raises(ValueError, match="u.parquet was not written"): write_samples(make_samples(["a"]).assign(z=1j), tmp_path / "u.parquet")
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_times_in_milliseconds_as_names(tmp_path):
    for i in range(3): paint(tmp_path / f"v/t/a_{1700000000123 + 40 * i}.jpg", i)
    with pytest.warns(UserWarning, match="fits 32 bits") as said: table = read_tracklets(tmp_path)
    assert table.frame.tolist() == [0, 1, 2] and table.attrs["positions"] == 1
    pattern = str(said[0].message).partition("pattern='")[2].partition("'")[0]
    assert np.diff(read_tracklets(tmp_path, pattern=pattern).frame).tolist() == [40, 40]                          # as the warning says
    with pytest.raises(ValueError, match="does not fit 32 bits .v/t/a_"): read_tracklets(tmp_path, pattern="a_{frame}.jpg")


def test_folders_name_the_file_of_a_bad_row(tmp_path):
    paint(tmp_path / "5/c1_1.jpg"); paint(tmp_path / "99999999999999999999/c1_1.jpg")
    with pytest.raises(ValueError, match="column 'pid', row 1: .*more than 18 digits.*99999/c1_1.jpg"): read_folder(tmp_path, "{pid}/c{camid}_{frame}.jpg")
    (tmp_path / "99999999999999999999").rename(tmp_path / "6"); (tmp_path / "6/c1_1.jpg").rename(tmp_path / "6/c40000_1.jpg")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: column 'camid', row 1: .*6/c40000_1.jpg"): read_folder(tmp_path, "{pid}/c{camid}_{frame}.jpg")


def test_lists_that_name_an_image_twice(tmp_path):
    for n, (folder, name) in enumerate((("train", "train"), ("train", "val"), ("test", "query"), ("test", "gallery"))):
        file = f"0000/0000_{n:03d}_01_0303morning_0015_0.jpg"
        paint(tmp_path / folder / file, n); (tmp_path / f"list_{name}.txt").write_text(f"{file} 0\n")
    with pytest.warns(UserWarning, match="not the published set"): assert len(read_msmt17(tmp_path)) == 4
    (tmp_path / "list_gallery.txt").write_text((tmp_path / "list_query.txt").read_text())
    with pytest.raises(ValueError, match="1 image twice: test/0000/0000_002"): read_msmt17(tmp_path)


def test_text_person_annotations_come_back(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([dict(id=5, file_path="CUHK01\\1.png", split=s, captions=["a man", "a hat"], path="x", camid=None) for s in ("train", "test")]))
    with pytest.warns(UserWarning, match="'path' is kept as path_in_file"): table = read_cion_al(tmp_path / "a.json")
    assert table.path[0] == "CUHK01/1.png" and table.split.tolist() == ["train", "gallery"] and table.camid[0] == -1 and table.attrs["dataset"] == "annotation"
    again = read_samples(write_samples(table, tmp_path / "t.parquet"))
    assert again.captions.tolist() == table.captions.tolist()


def test_deep_and_clear_images(tmp_path):
    ramp = np.linspace(0, 1, 512).reshape(32, 16)
    want = (ramp * 255).round()
    for bits in (8, 10, 12, 14, 16):
        Image.fromarray((ramp * (2**bits - 1)).round().astype(np.uint16)).save(tmp_path / f"{bits}.png")
        assert abs(np.asarray(open_image(tmp_path / f"{bits}.png"))[..., 0] - want).max() <= 1
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "32.tif")
    with pytest.raises(UnreadableImage, match="no known range"): open_image(tmp_path / "32.tif")
    for alpha, seen in ((0, images._CLEAR), (255, (255, 0, 255))):
        Image.new("RGBA", (4, 4), (255, 0, 255, alpha)).save(tmp_path / "c.png")
        assert open_image(tmp_path / "c.png").getpixel((0, 0)) == seen
    Image.new("P", (4, 4), 0).save(tmp_path / "p.png", transparency=0)
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == images._CLEAR


def test_check_says_how_images_are_stored_and_what_lies_beside(tmp_path):
    for i in range(3): paint(tmp_path / f"s/{i}.jpg", i)
    exif = Image.Exif(); exif[0x0112] = 6
    Image.open(tmp_path / "s/0.jpg").save(tmp_path / "s/turned.jpg", exif=exif)
    Image.new("RGB", (8, 16), (9, 9, 9)).save(tmp_path / "s/dark.png"); Image.new("RGBA", (8, 16), (99, 0, 0, 9)).save(tmp_path / "s/clear.png")
    for bits in (12, 16): Image.fromarray(np.full((16, 8), 2**bits - 1, np.uint16)).save(tmp_path / f"s/{bits}.png")
    Image.new("L", (8, 16), 99).save(tmp_path / "s/film.gif", save_all=True, append_images=[Image.new("L", (8, 16), 9)])
    for n in ("s/x.heic", "s/Thumbs.db"): (tmp_path / n).touch()
    names = ["0.jpg", "turned.jpg", "dark.png", "clear.png", "12.png", "16.png", "film.gif"]
    found = check(make_samples([f"s/{n}" for n in names]), tmp_path, progress=False)
    assert {k: found.details[k] for k in ("dark", "turned", "clear", "several", "unlisted")} == dict(dark=["s/dark.png"], turned=["s/turned.jpg"], clear=["s/clear.png"], several=["s/film.gif"], unlisted=["s/1.jpg", "s/2.jpg"])
    assert found.details["bits"].to_dict() == {"s/12.png": 12, "s/16.png": 16} and found.details["left_out"] == {".heic": 1, ".db": 1} and len(found.problems) == 1
    for words in ("1 image is turned by EXIF", "1 as 12 bits, 1 as 16 bits; depths differ", "2 images on disk not in the table, by folder: 2 in .", "pillow-heif"): assert words in str(found)

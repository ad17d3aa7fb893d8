"""The table of samples: bad columns, numbers and frames read from names, files written whole."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from examples import paint, warned
from hypothesis import given, settings, strategies as st

from cion_nb.core import samples as S
from cion_nb.core.samples import (
    as_samples,
    COLUMNS,
    make_samples,
    read_csv,
    read_folder,
    read_samples,
    read_tracklets,
    write_samples,
)
from cion_nb.data.check import check
from cion_nb.data.datasets import read_msmt17

# ---- the table -------------------------------------------------------------------------------------------------

ids = st.integers(-1, 2**62)
rows = st.lists(st.tuples(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=8), ids,
                          st.integers(-1, 2**15 - 1), st.integers(-1, 2**31 - 1), st.sampled_from(S.SPLITS)),
                max_size=12)


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
    (dict(pid=[1, None]), "column 'pid', row 1"), (dict(pid=["1", "x"]), "column 'pid', row 1: 'x'"),
    (dict(pid=-2), "column 'pid', row 0"),
    (dict(camid=2**15), "int16"), (dict(frame=2**31), "int32"), (dict(frame=.5), "column 'frame', row 0"),
    (dict(pid=[1, float("inf")]), "row 1"),
    (dict(split=["train", "valid"]), "column 'split', row 1: 'valid'"),
    (dict(video=["a", None]), "column 'video', row 1"),
    (dict(video=["a", "b"], tracklet=0), "unique over all videos"),
    (dict(pid=[1, 2, 3]), "'pid' has 3 rows, 'path' has 2")])
def test_bad_columns_are_named(change, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make_samples(["a.jpg", "b.jpg"], **change)


def test_as_samples_orders_columns_numbers_rows_and_keeps_large_ids():
    table = make_samples([Path("a") / "b.jpg", "c.jpg", "d.jpg"], pid=[2**62 + 1, 3, 3], split="train",
                         extra=["x", "y", "z"])
    assert table.pid[0] == 2**62 + 1 and table.path[0] == "a/b.jpg"
    part = as_samples(table[["extra", *reversed(COLUMNS)]].iloc[1:])
    assert part.columns.tolist() == [*COLUMNS, "extra"] and part.index.tolist() == [0, 1]
    with pytest.raises(ValueError, match="path.*row 1: empty"): make_samples(["a", ""])
    with pytest.raises(ValueError, match="no column path, tracklet"):
        as_samples(table.drop(columns=["path", "tracklet"]))
    before = table.copy()
    as_samples(table)
    pd.testing.assert_frame_equal(before, table)


def test_large_integer_ids_given_as_text_stay_exact():
    assert make_samples(["a", "b"], pid=[str(2**62 + 1), "-1"]).pid.tolist() == [2**62 + 1, -1]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_samples(make_samples(["a.jpg"]), tmp_path / "s.parquet")
    def fail(self, where, **kwargs):
        Path(where).write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(OSError, match="disk full"): write_samples(make_samples(["b.jpg"]), path)
    assert os.listdir(tmp_path) == ["s.parquet"] and read_samples(path).path[0] == "a.jpg"
    (tmp_path / "plain").touch()
    assert oct(path.stat().st_mode) == oct((tmp_path / "plain").stat().st_mode), "as any file, by the umask"


def test_tracklets(tmp_path):
    for name in ("day1/cam2/t1/000010.jpg", "day1/cam2/t1/000009.jpg", "day1/cam2/t2/a.jpg", "day1/cam2/t2/b.jpg",
                 "v/t1/x_20201121123456789.jpg", "v/t10/1_7.jpg", "v/t9/0007.jpg", "v/t9/7.png"):
        paint(tmp_path / name)
    table = read_tracklets(tmp_path)
    assert table.video.tolist() == ["day1/cam2"] * 4 + ["v"] * 4
    assert table.tracklet.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert table.tracklet_name.tolist() == ["t1", "t1", "t2", "t2", "t1", "t9", "t9", "t10"]
    assert table.frame.tolist() == [9, 10, 0, 1, 0, 0, 1, 7]   # a date too long for int32, and 7 twice: positions
    with pytest.raises(ValueError, match="2 images lie in no tracklet folder"): read_tracklets(tmp_path / "v" / "t9")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"): read_tracklets(tmp_path / "empty")


def test_read_folder_patterns(tmp_path):
    for name in ("train/0001/c2_f0010_x.jpg", "train/0012/c1_f0002_y.jpg", "test/-1/c12_f0003_zz.jpg"):
        paint(tmp_path / name)
    table = read_folder(tmp_path, "{split}/{pid}/c{camid}_f{frame}_*.jpg")
    assert table.split.tolist() == ["gallery", "train", "train"] and table.pid.tolist() == [-1, 1, 12]
    assert table.camid.tolist() == [12, 2, 1] and table.frame.tolist() == [3, 10, 2]
    assert read_folder(tmp_path, "**/c{camid}*.jpg").camid.tolist() == [12, 2, 1]   # digits are taken whole
    assert read_folder(tmp_path, "{split}/{pid}/{kind}_f*_{mark}.jpg", splits={"test": "query"}).mark.tolist() == [
        "zz", "x", "y"]
    with pytest.raises(ValueError, match="'split', row 0: 'test'"):
        read_folder(tmp_path, "{split}/**.jpg", splits={"test": "test"})
    with pytest.raises(ValueError, match="none of 3 images"): read_folder(tmp_path, "{pid}/{frame}.jpg")
    with pytest.raises(ValueError, match="is no field name"): read_folder(tmp_path, "{path}")
    with pytest.raises(FileNotFoundError): read_folder(tmp_path / "none", "*")


def test_read_folder_of_some_folders_reads_them_whole(tmp_path):
    for name in ("train/0001_c2.jpg", "trainer/0002_c2.jpg", "deep/er/0003_c1.jpg", "x.jpg"): paint(tmp_path / name)
    (tmp_path / "clip.mp4").touch()
    table, said = warned(read_folder, tmp_path, "**/{pid}_c{camid}.jpg", folders=["train", "deep/er"])
    assert said == [] and table.pid.tolist() == [3, 1] and table.attrs == dict(
        dataset="folder", pattern="**/{pid}_c{camid}.jpg", unmatched=0)
    with pytest.raises(ValueError, match="query holds no image: unpack"):
        read_folder(tmp_path, "**/{pid}_c{camid}.jpg", folders=["train", "query"])
    with pytest.raises(ValueError, match=f"{tmp_path}/x.jpg: does not fit .*; take out"):
        read_folder(tmp_path, "**/{pid}_c{camid}.jpg", folders=["."])


def test_read_csv(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("path;pid;camid;frame;split;box w\n a.jpg ;7;;3;train;1.5\nb.jpg;;2;;;\n")
    table = read_csv(file, sep=";")
    assert table.pid.tolist() == [7, -1] and table.camid.tolist() == [-1, 2]
    assert table.split.tolist() == ["train", ""] and np.isnan(table["box w"][1])
    file.write_text("path,video\n/x/a.jpg,NA\n")
    assert read_csv(file).video[0] == "NA"  # a video may be called NA
    with pytest.raises(ValueError, match="does not lie under root"): read_csv(file, tmp_path)
    file.write_text("path\n\n")
    assert len(read_csv(file)) == 0
    file.write_text("path,pid\na.jpg,1.5\n")
    with pytest.raises(ValueError, match=r"column 'pid', row 0: '1.5'"): read_csv(file)
    with pytest.raises(ValueError, match="no column 'who'"): read_csv(file, columns=dict(pid="who"))
    (tmp_path / "in").mkdir()
    paint(tmp_path / "in" / "a.jpg")
    file.write_text(f"path,pid\n{tmp_path}/in/a.jpg,4\n")
    assert read_csv(file, tmp_path / "in").path.tolist() == ["a.jpg"]


def test_a_table_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no samples table at .*gone.parquet"):
        read_samples(tmp_path / "gone.parquet")
    write_samples(make_samples(path=["a.jpg"]), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    for damaged in (b"", b"PAR1", whole[:-9], whole[:40] + b"\0" * 20 + whole[60:-30] + b"\0" * 22 + whole[-8:]):
        (tmp_path / "t.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match="t.parquet is no readable samples table"):
            read_samples(tmp_path / "t.parquet")


# ---- files as people have them ---------------------------------------------------------------------------------

@pytest.mark.parametrize("names, frames, said", [
    (["000001_0.93", "000002_0.87", "000003_0.87"], [1, 2, 3], ""),
    (["f000010_x120_y44_w30_h90", "f000011_x121_y44_w31_h88"], [10, 11], ""),
    (["0001C1T0001F001", "0001C1T0001F002"], [1, 2], ""),
    (["0001_C1_F0001_X94071", "0001_C1_F0002_X94083"], [1, 2], ""),
    (["000007_128x64", "000008_128x65", "000009_130x63"], [7, 8, 9], ""),
    (["0002_c1s1_000451_03", "0002_c1s1_000551_01"], [451, 551], ""),
    (["0002_c1s1_000451_01", "0002_c1s1_000551_02"], [451, 551], "451 or 01; 000451 is taken"),
    (["cam1.0451", "cam1.0452"], [451, 452], ""),
    (["000001", "000002", "000002 (1)"], [0, 2, 1], "no number of the names grows"),
    (["2024-05-01_10-00-01", "2024-05-01_10-00-02", "2024-05-01_10-01-00"], [0, 1, 2], "no number of the names grows"),
    (["000002_right", "000001_left"], [1, 2], ""), (["7", "9", "8"], [7, 8, 9], "")])
def test_the_field_that_is_the_frame(tmp_path, recwarn, names, frames, said):
    for n in names: paint(tmp_path / "v" / "t1" / f"{n}.jpg")
    table = read_tracklets(tmp_path)
    found = dict(zip((Path(p).stem for p in table.path), table.frame))
    assert sorted(found.values()) == sorted(frames)
    assert [found[n] for n in sorted(found)] == [dict(zip(sorted(names), frames))[n] for n in sorted(found)]
    assert said in " ".join(str(w.message) for w in recwarn) and bool(said) == bool(len(recwarn))


def test_one_odd_tracklet_does_not_change_the_others(tmp_path):
    for t in range(4):
        for f in (9, 10): paint(tmp_path / f"t{t}" / f"{f:04d}_{10 * f % 7}.jpg")
    paint(tmp_path / "t3" / "0009_9.png")
    with pytest.warns(UserWarning, match="in 1 of 4 tracklets"): table = read_tracklets(tmp_path)
    assert table.frame.tolist() == [9, 10] * 3 + [0, 1, 2] and table.attrs["positions"] == 1
    assert any("positions" in n for n in check(table, tmp_path, progress=False).notes)
    with pytest.warns(UserWarning, match="1 image repeats a frame"):
        assert read_tracklets(tmp_path, pattern="{frame}_*").frame.max() == 10
    with pytest.raises(ValueError, match="no {frame}"): read_tracklets(tmp_path, pattern="{pid}_*")


def test_names_that_are_no_utf8_are_shown(tmp_path):
    os.makedirs(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    paint(tmp_path / "ok/1.jpg")
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9", b"1.jpg"), "wb"): pass
    for read in (read_tracklets, lambda r: read_folder(r, "*/{frame}.jpg")):
        with pytest.raises(ValueError, match=r"1 file name is no UTF-8: 'caf\\xe9/1.jpg'; .*convmv.*unzip -O"):
            read(tmp_path)
    for column in (dict(path=["a", "\udce9"]), dict(path=["a", "b"], video=["a", "\udce9"])):
        with pytest.raises(ValueError, match=r"row 1: '\\xe9' is no UTF-8"): make_samples(**column)


@pytest.mark.parametrize("names, pids, said", [
    (["-1", "0000", "0002"], [-1, 0, 2], ""), (["00-1", "-1", "0000", "0002"], [-1, -1, 0, 2], "'00-1' is read as -1"),
    (["alice", "bob"], [1, 2], ""),
    (["alice", "-1"], [1, -1], ""), (["0007", "bob", "0002"], [7, 8, 2], "1 word among the numbers of pid"),
    (["7", "007"], [7, 7], "are one number")])
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


def test_saved_tables_name_their_file(tmp_path):
    file = tmp_path / "t.parquet"
    pd.DataFrame(dict(a=[1])).to_parquet(file)
    with pytest.raises(ValueError, match="t.parquet: no column path"): read_samples(file)
    make_samples(["a"]).assign(split="val").to_parquet(file)
    with pytest.raises(ValueError, match="t.parquet: column 'split', row 0"): read_samples(file)
    with pytest.raises(ValueError, match="u.parquet was not written"):
        write_samples(make_samples(["a"]).assign(z=1j), tmp_path / "u.parquet")
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_times_in_milliseconds_as_names(tmp_path):
    for i in range(3): paint(tmp_path / f"v/t/a_{1700000000123 + 40 * i}.jpg", i)
    with pytest.warns(UserWarning, match="fits 32 bits") as said: table = read_tracklets(tmp_path)
    assert table.frame.tolist() == [0, 1, 2] and table.attrs["positions"] == 1
    pattern = str(said[0].message).partition("pattern='")[2].partition("'")[0]
    # as the warning says
    assert np.diff(read_tracklets(tmp_path, pattern=pattern).frame).tolist() == [40, 40]
    with pytest.raises(ValueError, match="does not fit 32 bits .v/t/a_"):
        read_tracklets(tmp_path, pattern="a_{frame}.jpg")


def test_folders_name_the_file_of_a_bad_row(tmp_path):
    paint(tmp_path / "5/c1_1.jpg")
    paint(tmp_path / "99999999999999999999/c1_1.jpg")
    with pytest.raises(ValueError, match="column 'pid', row 1: .*more than 18 digits.*99999/c1_1.jpg"):
        read_folder(tmp_path, "{pid}/c{camid}_{frame}.jpg")
    (tmp_path / "99999999999999999999").rename(tmp_path / "6")
    (tmp_path / "6/c1_1.jpg").rename(tmp_path / "6/c40000_1.jpg")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: column 'camid', row 1: .*6/c40000_1.jpg"):
        read_folder(tmp_path, "{pid}/c{camid}_{frame}.jpg")


def test_lists_that_name_an_image_twice(tmp_path):
    for n, (folder, name) in enumerate((("train", "train"), ("train", "val"), ("test", "query"), ("test", "gallery"))):
        file = f"0000/0000_{n:03d}_01_0303morning_0015_0.jpg"
        paint(tmp_path / folder / file, n)
        (tmp_path / f"list_{name}.txt").write_text(f"{file} 0\n")
    with pytest.warns(UserWarning, match="not the published set"): assert len(read_msmt17(tmp_path)) == 4
    (tmp_path / "list_gallery.txt").write_text((tmp_path / "list_query.txt").read_text())
    with pytest.raises(ValueError, match="1 image twice: test/0000/0000_002"): read_msmt17(tmp_path)

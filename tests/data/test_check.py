"""The data report finds each fault and nothing else."""
import warnings

import numpy as np
import pytest
from examples import market, paint
from PIL import Image
from scene_sets import Prw

from cion_nb.core.samples import make_samples
from cion_nb.data.check import check
from cion_nb.data.datasets import read_market1501
from cion_nb.data.scenes import read_prw

# ---- the report ------------------------------------------------------------------------------------------------

def test_check_finds_each_fault_and_nothing_else(tmp_path):
    names = [f"{i}.png" for i in range(8)]
    for i, n in enumerate(names): paint(tmp_path / n, i)
    table = make_samples(names, pid=[1, 1, 2, 2, 3, 4, 3, 4], camid=[1, 2, 1, 2, 1, 1, 2, 2],
                         split=["train"] * 4 + ["query"] * 2 + ["gallery"] * 2)
    clean = check(table, tmp_path, progress=False)
    assert clean.ok and not clean.notes and clean.counts.loc["train"].tolist() == [4, 2, 2, 0]
    assert "no problem" in str(clean)
    def problems(t, **kw): return check(t, tmp_path, progress=False, **kw).problems
    assert "1 person is in train and in test: 3" in problems(table.assign(pid=[3, 3, 2, 2, 3, 4, 3, 4]))[0]
    assert "1 query has no match in another camera; people: 4" in problems(
        table.assign(camid=[1, 2, 1, 2, 1, 1, 2, 1]))[0]
    # unknown cameras: every image may be another camera's
    assert problems(table.assign(camid=-1)) == []
    single = check(table.assign(camid=[1, 1, 1, 2, 1, 1, 2, 2]), tmp_path, progress=False)
    assert single.ok and single.notes == ["1 person is seen by one camera only: 1"]
    paint(tmp_path / "1.png", 0)
    paint(tmp_path / "6.png", 0)  # inside train: a note; in the gallery too: a problem, under another person
    found = check(table, tmp_path, progress=False)
    assert [p.split(":")[0] for p in found.problems] == ["1 picture is in two splits", "1 picture has two person ids"]
    assert found.notes[0].startswith("1 picture is stored more than once")
    assert set(found.details["across_splits"].path) == {"0.png", "1.png", "6.png"}
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "4.png").unlink()
    found = check(table, tmp_path, progress=False)
    assert found.details["missing"] == ["4.png"] and found.details["unreadable"].index.tolist() == ["2.png", "3.png"]
    assert check(table, tmp_path, decode=False, progress=False).details["unreadable"].index.tolist() == ["3.png"]
    assert "published" not in str(found) and found._repr_html_().count("<li>") == len(found.problems) + len(found.notes)
    assert check(table).ok and "not looked at" in check(table).title


def test_check_counts_and_html_escape(tmp_path):
    market(tmp_path)
    table = read_market1501(tmp_path)
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
    again = check(make_samples(["0.jpg", "0.jpg"], split=["query", "gallery"], pid=1), tmp_path, decode=False,
                  progress=False)
    assert any("1 path is in the table more than once" in p for p in again.problems)
    assert any("two splits" in p for p in again.problems)
    with pytest.raises(FileNotFoundError, match="no folder"): check(make_samples([]), tmp_path / "none")


def test_check_says_how_images_are_stored_and_what_lies_beside(tmp_path):
    for i in range(3): paint(tmp_path / f"s/{i}.jpg", i)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "s/0.jpg").save(tmp_path / "s/turned.jpg", exif=exif)
    Image.new("RGB", (8, 16), (9, 9, 9)).save(tmp_path / "s/dark.png")
    Image.new("RGBA", (8, 16), (99, 0, 0, 9)).save(tmp_path / "s/clear.png")
    for bits in (12, 16): Image.fromarray(np.full((16, 8), 2**bits - 1, np.uint16)).save(tmp_path / f"s/{bits}.png")
    Image.new("L", (8, 16), 99).save(tmp_path / "s/film.gif", save_all=True, append_images=[Image.new("L", (8, 16), 9)])
    for n in ("s/x.heic", "s/Thumbs.db"): (tmp_path / n).touch()
    names = ["0.jpg", "turned.jpg", "dark.png", "clear.png", "12.png", "16.png", "film.gif"]
    found = check(make_samples([f"s/{n}" for n in names]), tmp_path, progress=False)
    assert {k: found.details[k] for k in ("dark", "turned", "clear", "several", "unlisted")} == dict(
        dark=["s/dark.png"], turned=["s/turned.jpg"], clear=["s/clear.png"], several=["s/film.gif"],
        unlisted=["s/1.jpg", "s/2.jpg"])
    assert found.details["bits"].to_dict() == {"s/12.png": 12, "s/16.png": 16}
    assert found.details["left_out"] == {".heic": 1, ".db": 1} and len(found.problems) == 1
    for words in ("1 image is turned by EXIF", "1 as 12 bits, 1 as 16 bits; depths differ",
                  "2 images on disk not in the table, by folder: 2 in .", "pillow-heif"):
        assert words in str(found)


# ---- whole frames ----------------------------------------------------------------------------------------------

def test_frames_are_counted_once_and_a_query_is_a_box_in_one_of_them(tmp_path):
    "Counts of PRW's reader by loops; of a true fault the sentence stays: a frame that is gone, a query nobody answers."
    prw, pid = Prw(3), 7
    for rows in (prw.frames[name][1] for name in prw.test): rows[:] = [row for row in rows if row[0] != pid]
    for name in prw.test[:2]: prw.frames[name][1].append([pid, 1., 1., 20., 30.])
    prw.queries = [(pid, [1, 1, 20, 30], prw.test[0])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = read_prw(prw.write(tmp_path))
    for i, path in enumerate(table.path.unique()): paint(tmp_path / path, i)
    found = check(table, tmp_path, progress=False, published=False)
    boxes = {split: sum(len(prw.frames[name][1]) for name in names) for split, names in
             (("train", prw.train), ("gallery", prw.test))}
    for split, names in (("train", prw.train), ("gallery", prw.test)):
        assert found.counts.loc[split, ["images", "boxes"]].tolist() == [len(names), boxes[split]]
    assert found.counts.loc["query", ["images", "boxes"]].tolist() == [1, 1]
    assert f"{len(prw.frames)} frames, {sum(boxes.values())} boxes" in found.title
    said = " ".join(found.problems + found.notes)
    for words in ("more than once", "two splits", "two person ids", "images have no"): assert words not in said, said
    unnamed = int((table.pid < 0)[(table.split != "query") & ~table.ignored].sum())
    assert f"{unnamed} of {sum(boxes.values())} boxes have no person id" in said
    lonely = table[(table.split != "gallery") | (table.path == table.path[table.split == "query"].iloc[0])]
    assert any("1 query has no match in another frame; people: 7" in p for p in check(lonely).problems)
    (tmp_path / table.path.iloc[0]).unlink()
    assert any(p.startswith("1 image is missing") for p in check(table, tmp_path, progress=False).problems)

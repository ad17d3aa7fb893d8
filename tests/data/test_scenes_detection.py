"""COCO, CrowdHuman and MOT sequences against loops over made-up folders, and what they refuse."""
import json

import numpy as np
import pytest
from examples import quiet, warned
from PIL import Image
from places import DATA
from scene_sets import expected, pictures, rows_of, write_coco, write_crowdhuman, write_mot, write_sequence

from cion_nb.data.scenes import BOX, frames_of, read_coco, read_crowdhuman, read_mot_sequence

# ---- COCO -----------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_coco_by_loops(tmp_path, seed):
    truth = write_coco(tmp_path, seed)
    table, said = warned(read_coco, tmp_path / "instances.json", tmp_path / "images")
    assert rows_of(table) == expected(truth) and not said
    assert set(table.split) == {"train"} and (table[["pid", "camid", "tracklet", "frame"]] == -1).all(axis=None)
    people = [row for _, rows in truth for row in rows]
    outside = [x < 0 or y < 0 or x + w > 64 or y + h > 48 for x, y, w, h, *_ in people]
    assert table.attrs == dict(dataset="annotated frames", counts=dict(
        frames=12, boxes=sum(not row[4] for row in people), ignored=sum(row[4] for row in people),
        empty=sum(not rows for _, rows in truth), outside=sum(outside), no_area=0, named_twice=0))
    other = read_coco(tmp_path / "instances.json", tmp_path / "images", split="gallery")
    assert set(other.split) == {"gallery"} and other.assign(split=table.split).equals(table)


def test_coco_is_compared_with_what_is_published_under_its_own_name(tmp_path):
    write_coco(tmp_path, 0)
    (tmp_path / "instances.json").rename(tmp_path / "instances_train2017.json")
    table, said = warned(read_coco, tmp_path / "instances_train2017.json", tmp_path / "images")
    assert table.attrs["dataset"] == "coco" and len(said) == 1
    assert "COCO 2017: not the published set (train: 12 frames, published are 118,287)" in said[0]


def test_paths_from_other_machines(tmp_path):
    truth = write_coco(tmp_path, 1)
    file = tmp_path / "instances.json"
    lists = json.loads(file.read_text())
    def renamed(to, **how):
        images = [image | dict(file_name=to(image["file_name"])) for image in lists["images"]]
        file.write_text(json.dumps(lists | dict(images=images)), encoding="utf-8-sig")
        return read_coco(file, tmp_path / "images", **how)
    for to, how in ((lambda n: str(tmp_path / "images" / n), {}), (lambda n: f"./{n}", {}),
                    (lambda n: f"D:\\data\\coco\\{n}", dict(prefix="D:/data/coco")),
                    (lambda n: f"/mnt/coco/{n}", dict(prefix="/mnt/coco"))):
        assert rows_of(renamed(to, **how)) == expected(truth)
    with pytest.raises(ValueError, match="instances.json: row 0: .* is a path of another machine; prefix='D:/coco'"):
        renamed(lambda n: f"D:\\coco\\{n}")


def lists(**changes):
    return dict(images=[dict(id=1, file_name="a.jpg"), dict(id=2, file_name="b.jpg", width=64, height=None)],
                annotations=[dict(image_id=1, category_id=1, bbox=[1, 2, 3, 4])],
                categories=[dict(id=1, name="person")]) | changes


def boxed(*boxes, **more):
    return dict(annotations=[dict(image_id=1, category_id=1, bbox=box, **more) for box in boxes])


@pytest.mark.parametrize("change, words", [
    ("[1, 2]", "coco.json: expected lists of images, annotations, categories, found a list; boxes of people are in"),
    (dict(annotations=None), "expected lists .* found keys images, annotations, categories"),
    (dict(categories=[dict(id=3, name="dog")]), r"coco.json: of its categories \(dog\) none is called person"),
    (dict(categories=[dict(id=3, name="person"), dict(id=4, name="pedestrian")]), "2 are called person or pedestrian"),
    (dict(categories=[dict(id=3)]), "coco.json, category 0: expected id, name, found {'id': 3}"),
    (dict(images=[dict(id=1)]), "coco.json, image 0: expected id, file_name"),
    (dict(images=[dict(id=[1], file_name="a.jpg")]), r"image 0: id is \[1\], no number"),
    (dict(images=[dict(id=1, file_name="a.jpg"), dict(id=2, file_name="b.jpg"), dict(id=1, file_name="c.jpg")]),
     "images 0 and 2 have one id, 1"),
    (dict(images=[dict(id=1, file_name="a.jpg"), dict(id=2, file_name="./a.jpg")]), "images 0 and 1 have one file, 'a"),
    (dict(images=[dict(id=1, file_name=7)]), r"coco.json: row 0: 7 is no path \(row 0 is its first image\)"),
    (dict(annotations=[dict(image_id=9, category_id=1, bbox=[1] * 4)]), "annotation 0: there is no image with the id"),
    (dict(annotations=[dict(image_id=1, bbox=[1] * 4)]), "annotation 0: expected image_id, category_id, bbox, found"),
    (boxed([1, 2, 3, 4], [1, 2, 3]), r"annotation 1: \[1, 2, 3\] is no box: left, top, width and height are four"),
    (boxed("wide"), "annotation 0: wide is no box"),
    (boxed([1, 2, 3, 4], [1, 2, float("nan"), 4]), r"coco.json, annotation 1: \[1.0, 2.0, nan, 4.0\] of a.jpg is no"),
    (boxed([1, 2, None, 4]), "annotation 0: .*nan.* is no box"),
    (boxed([1, 2, -3, 4]), "annotation 0: .* the latter two not below 0")])
def test_coco_refuses_and_names(tmp_path, change, words):
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "coco.json").write_text(change if isinstance(change, str) else json.dumps(lists(**change)))
    with pytest.raises(ValueError, match=words): read_coco(tmp_path / "coco.json", tmp_path)


def test_coco_files_that_broke_and_frames_that_are_lost(tmp_path):
    file, text = tmp_path / "coco.json", json.dumps(lists(), indent=1)
    pictures(tmp_path / "images/val", "a.jpg")
    file.write_text("\n".join(text.split("\n")[:9]))
    with pytest.raises(ValueError, match="coco.json is not valid JSON .*line 9"): read_coco(file, tmp_path / "images")
    file.write_text(text)
    def read(root): return read_coco(file, tmp_path / root)
    with pytest.raises(FileNotFoundError, match="coco.json: 1 of 2 frames are not under .*val: b.jpg; unpack the"):
        read("images/val")
    with pytest.raises(FileNotFoundError, match="2 of 2 frames are not .*: a.jpg, b.jpg; .*images/val has it: pass"):
        read("images")
    with pytest.raises(FileNotFoundError, match="there is no folder .*gone to hold its frames"): read("gone")
    pictures(tmp_path / "images/val", "b.png")
    with pytest.raises(FileNotFoundError, match="b.jpg; it is there as b.png: another ending"): read("images/val")


def test_an_entry_keeps_its_own_number_where_the_table_sorts_it(tmp_path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    entries = [dict(image_id=k, category_id=1, bbox=[1, 2, 3, side]) for k, side in ((2, 4), (2, 4), (1, float("inf")))]
    (tmp_path / "coco.json").write_text(json.dumps(lists(annotations=entries)))
    with pytest.raises(ValueError, match="coco.json, annotation 2: .*inf.* of a.jpg is no box"):
        read_coco(tmp_path / "coco.json", tmp_path)


def test_boxes_without_area_and_entries_that_say_ignore(tmp_path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "coco.json").write_text(json.dumps(lists(**boxed([1, 2, 0, 4], [5, 6, 7, 8])) | dict(extra=1)))
    table = read_coco(tmp_path / "coco.json", tmp_path)
    assert table.ignored.tolist() == [True, False, True] and table.attrs["counts"]["no_area"] == 1
    (tmp_path / "coco.json").write_text(json.dumps(lists(**boxed([1, 2, 3, 4], ignore=1))))
    assert read_coco(tmp_path / "coco.json", tmp_path).ignored.tolist() == [True, True]
    (tmp_path / "coco.json").write_text(json.dumps(lists(annotations=[])))
    table = read_coco(tmp_path / "coco.json", tmp_path)                       # nobody in any image
    assert table[BOX].to_numpy().tolist() == [[0] * 4] * 2 and table.attrs["counts"]["empty"] == 2


# ---- CrowdHuman -----------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_crowdhuman_by_loops(tmp_path, seed):
    truth = write_crowdhuman(tmp_path, seed)
    table, said = warned(read_crowdhuman, tmp_path / "annotation_train.odgt", tmp_path)
    assert rows_of(table) == expected(truth) and table.attrs["dataset"] == "crowdhuman"
    assert len(said) == 1 and "CrowdHuman: not the published set (train: 8 frames, published are 15,000)" in said[0]
    inner, said = warned(read_crowdhuman, tmp_path / "annotation_train.odgt", tmp_path / "Images", split="gallery")
    assert [f"Images/{p}" for p in inner.path] == table.path.tolist() and set(inner.split) == {"gallery"} and not said


def line(**changes): return json.dumps(dict(ID="b", gtboxes=[dict(fbox=[1, 2, 3, 4], tag="person")]) | changes)


@pytest.mark.parametrize("second, words", [
    (line()[:-9], r"a.odgt, line 3: no valid JSON \(.*, column \d+\); copy the file again, or mend the line"),
    (line(gtboxes=None), "a.odgt, line 3: gtboxes is None, no list"),
    ("[3]", r"line 3: expected ID, gtboxes, found \[3\]"),
    (line(ID="a"), "a.odgt, lines 1 and 3 have one image, 'a'"),
    (line(gtboxes=[dict(tag="person")]), "line 3, box 0: expected fbox, tag"),
    (line(gtboxes=[dict(fbox=[1, 2, 3], tag="person")]), r"line 3, box 0: \[1, 2, 3\] is no box"),
    (line(gtboxes=[dict(fbox=[1, 2, 3, 4], tag="mask"), dict(fbox=[1, 2, 3, 4], tag="dog")]),
     "line 3, box 1: tag 'dog' is not known.* Known: person, mask"),
    (line(gtboxes=[dict(fbox=[1, float("nan"), 3, 4], tag="person")]),
     r"a.odgt, line 3, box 0: \[1.0, nan, .* of b.jpg is no box")])
def test_crowdhuman_refuses_and_names(tmp_path, second, words):
    pictures(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.odgt").write_text(f"{line(ID='a')}\n\n{second}\n")
    with pytest.raises(ValueError, match=words): read_crowdhuman(tmp_path / "a.odgt", tmp_path)


def test_crowdhuman_frames_that_are_lost(tmp_path):
    (tmp_path / "Images").mkdir()
    (tmp_path / "a.odgt").write_text("\n".join(line(ID=str(k)) for k in range(9)))
    with pytest.raises(FileNotFoundError, match="a.odgt: 9 of 9 frames .*: Images/0.jpg, .* and 6 more; unpack"):
        read_crowdhuman(tmp_path / "a.odgt", tmp_path)


# ---- MOT ------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_mot_by_loops(tmp_path, seed):
    truth = write_mot(tmp_path, seed)
    table = read_mot_sequence(tmp_path)
    assert rows_of(table) == expected([(path, rows) for path, rows in truth])
    names = [row[5] for _, rows in truth for row in (rows or [(*[None] * 5, None)])]
    numbers = {}
    for row, name in zip(table.itertuples(), names, strict=True):
        assert (row.pid >= 0) == (name is not None) and row.pid == row.tracklet
        if name: assert numbers.setdefault(name, row.pid) == row.pid
    assert len(set(numbers.values())) == len(numbers)                         # and no number is two people's
    assert (table.path == table.video + "/img1/" + (table.frame + 1).astype(str).str.zfill(6) + ".jpg").all()
    assert table.attrs["sequences"] == ["MOT17-02", "MOT17-04"] and table.attrs["dataset"] == "mot"
    lines = [row for name in set(table.video) for row in (tmp_path / name / "gt/gt.txt").read_text().split("\n")]
    assert table.attrs["other_classes"] == sum(row.split(",")[7] in ("3", "9") for row in lines)
    alone = read_mot_sequence(tmp_path / "MOT17-04")
    assert alone.path.str.startswith("img1/").all() and len(alone) == (table.video == "MOT17-04").sum()


def test_mot17_is_read_once(tmp_path, capsys):
    def write(name): write_sequence(tmp_path / name, ["1,1,2,2,9,9,1,1,1"])
    for detector in ("DPM", "FRCNN", "SDP"): write(f"train/MOT17-02-{detector}")
    write("train/MOT17-04-SDP")
    write("other/MOT17-02-SDP")                                               # in another folder: somebody's own
    (tmp_path / "test/MOT17-01-DPM/img1").mkdir(parents=True)                # no truth
    table = read_mot_sequence(tmp_path)
    assert table.attrs["sequences"] == ["MOT17-02-SDP", "MOT17-02-DPM", "MOT17-04-SDP"]
    assert "3 of 5 folders" in capsys.readouterr().out
    write("more/MOT17-02-SDP")                                                # of one name: called by its folder
    assert "other/MOT17-02-SDP" in read_mot_sequence(tmp_path).attrs["sequences"]


def test_mot20_mot15_and_files_without_a_box(tmp_path):
    both = ["1,1,2,2,9,9,1,1,1", "1,2,2,2,9,9,0,6,1"]
    assert len(read_mot_sequence(write_sequence(tmp_path / "MOT20-01", both, 1))) == 2       # class 6 distracts there
    assert len(read_mot_sequence(write_sequence(tmp_path / "MOT17-01", both, 1))) == 1
    old = write_sequence(tmp_path / "PETS", ["1,9,499,158,31.5,75,1,-4.15,-7.35,0", "1,8,4,5,6,7,0,-4.15,-7.3,0"], 2)
    assert read_mot_sequence(old).ignored.tolist() == [False, True, True]
    none = read_mot_sequence(write_sequence(tmp_path / "empty", [], 2))
    assert none.attrs["counts"]["empty"] == len(none) == 2 and none.frame.tolist() == [0, 1]


def test_frames_that_cannot_be_read_are_frames(tmp_path):
    "Reading images is not a reader's work: the table stands, and only the right and lower edge go unknown."
    rows = ["1,1,60,2,9,9,1,1,1", "2,1,-3,2,9,9,1,1,1"]
    first = write_sequence(tmp_path / "seq", rows) / "img1/000001.jpg"
    assert read_mot_sequence(tmp_path).attrs["counts"]["outside"] == 2
    whole = read_mot_sequence(tmp_path)
    Image.new("L", (64, 48)).save(first)
    assert read_mot_sequence(tmp_path).equals(whole)
    for held in (first.read_bytes()[:200], b"", b"no image"):
        first.write_bytes(held)
        table = read_mot_sequence(tmp_path)
        assert table.equals(whole) and frames_of(table).boxes.tolist() == [1, 1, 0]
    assert table.attrs["counts"]["outside"] == 1


@pytest.mark.parametrize("rows, words", [
    (["1,1,2,2,9,9,1,1,1", "1,2,2,nan,9,9,1,1,1"], "gt.txt, line 2: .* has a value that is not finite"),
    (["1,1,2,2,9,9,1,1,1", "1,2,2"], "gt.txt, line 2"),
    (["4,7,2,2,9,9,1,1,1"], "gt.txt: id 7 is in frame 4 .from 1., of which .*img1 has no image; it has 3"),
    (["1,1,2,2,9,9,1,3,1"], r"gt.txt: no box is of class 1, the person; it has classes 3 \(1 boxes\)"),
    (["1,1,2,2,9,9,1,1,1", "2,5,2,2,-9,9,1,1,1"],
     r"gt.txt, frame 2 .from 1., id 5: \[2.0, 2.0, -9.0, 9.0\] of img1/000002.jpg is no box")])
def test_mot_refuses_and_names(tmp_path, rows, words):
    write_sequence(tmp_path, rows)
    with pytest.raises(ValueError, match=words): read_mot_sequence(tmp_path)


def test_mot_without_images_or_truth(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no gt/gt.txt in it or below; a sequence is a folder with"):
        read_mot_sequence(tmp_path)
    (tmp_path / "film/gt").mkdir(parents=True)
    (tmp_path / "film/gt/gt.txt").write_text("1,1,2,2,9,9,1,1,1")
    (tmp_path / "film/film.mp4").touch()
    with pytest.raises(FileNotFoundError, match="film has a gt/gt.txt, but no sequence of images .*ffmpeg -i FILM"):
        read_mot_sequence(tmp_path)


def test_one_id_twice_in_a_frame(tmp_path):
    write_sequence(tmp_path, ["1,1,2,2,9,9,1,1,1", "1,1,22,2,9,9,1,1,1", "2,1,2,2,9,9,1,1,1"])
    table, said = warned(read_mot_sequence, tmp_path)
    assert table.pid.tolist() == [0, -1, 0, -1] and table.ignored.tolist() == [False, False, False, True]
    assert len(said) == 1 and "1 box names a person who is named in that frame already: img1/000001.jpg" in said[0]
    assert np.array_equal(quiet(read_mot_sequence, tmp_path).tracklet, table.tracklet)


@pytest.mark.parametrize("name, frames, people, boxes, ignored", [
    ("PETS09-S2L1", 795, 19, 4476, 174), ("TUD-Campus", 71, 8, 359, 0)])
def test_real_truth_is_read_whole(tmp_path, name, frames, people, boxes, ignored):
    "Its people, its lines with flag 1 and with flag 0. The frames are black, for these clips are films."
    truth = DATA / "video" / name / "gt/gt.txt"
    if not truth.is_file(): pytest.skip("the folder with real clips is not here")
    write_sequence(tmp_path / name, truth.read_text().strip().split("\n"), frames)
    table = read_mot_sequence(tmp_path)
    counts = table.attrs["counts"]
    assert (counts["frames"], counts["boxes"], counts["ignored"]) == (frames, boxes, ignored)
    assert table.pid[table.pid >= 0].nunique() == people

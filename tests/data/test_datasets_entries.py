"""A data set that is one entry: read by its pattern, known by its name wherever a name is taken."""
import shutil

import pytest
from examples import Mean, put, quiet, SPEC, warned

from cion_nb.companion.commands import main
from cion_nb.companion.score import score
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.data.check import check
from cion_nb.data.datasets import data_sets, read_by_pattern, read_data, reader_of, READERS
from cion_nb.data.facts import DatasetFacts, DATASETS
from cion_nb.models.backbones import create_backbone, save_backbone

FILES = ["train/0001_c1_07.png", "train/0001_c2_09.png", "train/0002_c1_01.png",
         "query/0003_c1_02.png", "gallery/0003_c2_04.png", "gallery/0000_c2_05.png"]


def campus(**changes):
    "Its entry, as `DATASETS` would have it."
    return DatasetFacts(**dict(
        title="Campus", counts=dict(train=(3, 2), query=(1, 1), gallery=(2, 1)), layout="train/ query/ gallery/",
        licence="made up", home="nowhere", distractor=0, junk=0,
        pattern="{split}/{pid}_c{camid}_{frame}.png", folders=("train", "query", "gallery")) | changes)


@pytest.fixture(autouse=True)
def entry(monkeypatch):
    monkeypatch.setitem(DATASETS, "campus", campus())


def test_an_entry_is_read_and_says_nothing(tmp_path):
    table, said = warned(reader_of("campus"), put(tmp_path, *FILES))
    assert said == [] and table.attrs == dict(dataset="campus", junk=0) and "campus" in data_sets()
    assert table[["path", "pid", "camid", "frame", "split"]].values.tolist() == [
        ["gallery/0000_c2_05.png", 0, 2, 5, "gallery"], ["gallery/0003_c2_04.png", 3, 2, 4, "gallery"],
        ["query/0003_c1_02.png", 3, 1, 2, "query"], ["train/0001_c1_07.png", 1, 1, 7, "train"],
        ["train/0001_c2_09.png", 1, 2, 9, "train"], ["train/0002_c1_01.png", 2, 1, 1, "train"]]
    again = read_samples(write_samples(table, tmp_path / "t.parquet"))
    assert again.equals(table) and again.attrs == table.attrs


def test_an_entry_is_found_below_the_root_and_two_copies_are_refused(tmp_path):
    reader, inner = reader_of("campus"), tmp_path / "data" / "Campus-v1"
    put(inner, *FILES)
    for root in (tmp_path / "data", inner):
        assert all((root / p).is_file() for p in reader(root).path)
    with pytest.raises(FileNotFoundError, match="lies inside the data set: pass root="): reader(inner / "query")
    put(tmp_path / "data" / "other", *FILES)                      # of another name: many sets have such folders
    assert reader(tmp_path / "data").path.str.startswith("Campus-v1/").all()
    shutil.copytree(inner, tmp_path / "data" / "campus copy")
    with pytest.raises(ValueError, match="Campus lies in 2 places"): reader(tmp_path / "data")


def test_a_folder_of_another_name_is_known_by_its_word(tmp_path, monkeypatch):
    put(tmp_path / "UNI_2026", *FILES)
    with pytest.raises(FileNotFoundError, match="Campus .*not found"): reader_of("campus")(tmp_path)
    monkeypatch.setitem(DATASETS, "campus", campus(word="uni"))
    assert len(reader_of("campus")(tmp_path)) == 6


def test_without_folders_the_root_is_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "campus", campus(folders=()))
    assert len(reader_of("campus")(put(tmp_path, *FILES))) == 6
    put(tmp_path, "more/someone.png")
    with pytest.raises(ValueError, match="more/someone.png: does not fit"): reader_of("campus")(tmp_path)


def test_a_file_of_another_name_is_named(tmp_path):
    put(tmp_path, *FILES, "query/someone.png", "train/else.png")
    with pytest.raises(ValueError, match=f"{tmp_path}/query/someone.png: does not fit '{{split}}.*nor do 1 more"):
        reader_of("campus")(tmp_path)


def test_what_lies_beside_its_folders_is_passed_over(tmp_path):
    put(tmp_path, *FILES, "extra/0009_c1_01.png", "poster.png")
    (tmp_path / "clip.mp4").touch()
    table, said = warned(reader_of("campus"), tmp_path)
    assert len(table) == 6 and said == []


def test_an_empty_folder_is_named(tmp_path):
    put(tmp_path, *FILES)
    (tmp_path / "query" / "0003_c1_02.png").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/query holds no image: unpack"): reader_of("campus")(tmp_path)
    (tmp_path / "query").rmdir()
    with pytest.raises(FileNotFoundError, match="lacks query"): reader_of("campus")(tmp_path)


def test_other_counts_are_said_by_the_reader_and_by_check(tmp_path):
    put(tmp_path, *FILES)
    (tmp_path / "train/0002_c1_01.png").unlink()
    table, said = warned(reader_of("campus"), tmp_path)
    assert len(said) == 1 and "Campus: not the published set (train: 2 images, published are 3" in said[0]
    report = check(table, tmp_path, progress=False)
    assert "train: 2 images, published are 3" in report.problems and report.title.startswith("Campus")


def test_junk_is_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "campus", campus(junk=2))
    put(tmp_path, *FILES, "gallery/-1_c1_08.png", "gallery/-1_c2_09.png")
    table, said = warned(reader_of("campus"), tmp_path)
    assert said == [] and -1 not in set(table.pid) and 0 in set(table.pid) and table.attrs["junk"] == 2
    assert table.index.tolist() == list(range(6))
    assert "2 junk images (pid -1) dropped" in check(table).notes


def test_people_whom_no_path_names_are_no_junk(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "campus", campus(counts={}, pattern="{split}/*_c{camid}_*.png"))
    table = reader_of("campus")(put(tmp_path, *FILES))
    assert len(table) == 6 and set(table.pid) == {-1} and table.attrs["junk"] == 0


def test_splits_may_have_other_names(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "campus", campus(
        folders=("box_train", "query", "test"), splits=dict(box_train="train"), counts={}))
    table = reader_of("campus")(put(tmp_path, "box_train/0001_c1_1.png", "query/0002_c1_1.png", "test/0002_c2_1.png"))
    assert table.split.tolist() == ["train", "query", "gallery"]


def test_a_recipe_reads_it_by_its_name(tmp_path):
    put(tmp_path / "Campus", *FILES)
    asked = recipe("finetune", "tiny", data="campus", data_root=str(tmp_path))
    samples, root = read_data(asked, "train")
    assert samples.pid.tolist() == [1, 1, 2] and root == tmp_path
    assert read_data(asked, "test")[0].split.tolist() == ["gallery", "gallery", "query"]
    with pytest.raises(ValueError, match="'campus' needs data_root"): read_data(dict(asked, data_root=None), "train")


def test_an_unknown_name_is_told_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="'campsu' is not known; did you mean 'campus'.*or name a samples .parquet"):
        read_data(dict(data="campsu", data_root=str(tmp_path)), "train")
    with pytest.raises(ValueError, match="did you mean 'market1501'"): reader_of("market151")
    with pytest.raises(ValueError, match="'world' is not known"): reader_of("world")      # facts, but no pattern


@pytest.mark.parametrize("name", ["campsu", "mars"])
def test_a_name_without_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"data set '{name}' has no entry with a pattern"):
        read_by_pattern(name, tmp_path)


def test_a_reader_of_its_own_goes_before_a_pattern(monkeypatch):
    monkeypatch.setitem(READERS, "campus", lambda root: "read by hand")
    assert reader_of("campus")("anywhere") == "read by hand" and data_sets().count("campus") == 1


def test_a_command_takes_it_by_its_name(tmp_path, capsys):
    put(tmp_path / "Campus", *FILES)
    file = save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)).eval(), tmp_path / "b.safetensors")
    common = ["--root", str(tmp_path), "--model", str(file), "--out", str(tmp_path / "out"), "--check"]
    assert main(["extract", "campus", *common]) == 0
    assert main(["extract", "campsu", *common]) == 2
    assert "samples 'campsu' is not known; did you mean 'campus'" in capsys.readouterr().err


def test_a_score_takes_it_by_its_name(tmp_path):
    put(tmp_path / "data", *FILES)
    found = quiet(score, Mean(SPEC), "campus", tmp_path / "data", out=tmp_path / "features")
    assert len(found.per_query) == 1 and found.n_gallery == 2


def test_folders_are_a_tuple_of_names():
    with pytest.raises(TypeError, match="folders='query': a tuple"):
        DatasetFacts("Campus", {}, "", "", "", pattern="{pid}.png", folders="query")

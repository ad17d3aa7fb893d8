"""What a command line cannot mean is one line that names it: values, files of the wrong kind, other tables."""
import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
from filelock import FileLock

from cion_nb.companion.commands import main
from cion_nb.core.samples import write_samples
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities.denoise import denoise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Features beside their table, and what `denoise` made of them."
    here = tmp_path_factory.mktemp("world")
    x, samples = feature_world(20, seed=1)
    np.save(here / "x.npy", x)
    write_samples(samples, here / "samples.parquet")
    write_samples(samples.iloc[::-1], here / "reversed.parquet")
    denoise(x, samples, out=here / "found")
    return here


def refusal(capsys, line, code=2):
    "The one line with which a command refuses."
    found, said = main(line.split()), capsys.readouterr().err
    assert found == code and "Traceback" not in said, said
    assert len(said.splitlines()) == 1, said
    return said.strip()


@pytest.mark.parametrize("line, word", [
    ("extract samples.parquet --model m --out o --set device=banana", "unknown device 'banana'"),
    ("extract samples.parquet --model m --out o --check --set device=banana", "unknown device 'banana'"),
    ("extract samples.parquet --model m --out o --set batch_size=0", "extract setting batch_size=0: must be positive"),
    ("extract samples.parquet --model m --out o --set workers=-1", "workers must be a whole number"),
    ("extract samples.parquet --model m --out o --set precision=int8", "precision='int8': choose"),
    ("extract samples.parquet --model m --out o --set compute=int8", "compute='int8': use one of"),
    ("calibrate x.npy samples.parquet --set max_tracklets=-5", "max_tracklets must be a whole number"),
    ("calibrate x.npy samples.parquet --set max_images=0", "max_images must be a whole number"),
    ("calibrate x.npy samples.parquet --set min_samples=0", "min_samples must be a whole number"),
    ("calibrate x.npy samples.parquet --set device=banana", "unknown device 'banana'"),
    ("track v.mp4 --out o --set crop_quality=high", "crop_quality='high': a whole number is needed"),
    ("track v.mp4 --out o --set crop_quality=101", "crop_quality must be a whole number, from 0 to 100"),
    ("track v.mp4 --out o --set tracker_settings=3", "tracker_settings must be a dict"),
    ("track v.mp4 --out o --set frame_rate=-1", "frame_rate must be frames per second"),
    ("denoise x.npy samples.parquet --out o --set k1=0", "k1 must be a whole number"),
    ("denoise x.npy samples.parquet --out found --set sigma_cst=0.3", "holds the finished result of another request"),
    ("export found ids.csv --samples reversed.parquet", "its rows stand in another order: row 0"),
])
def test_values_and_tables_without_meaning(folder, line, word, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert word in refusal(capsys, line)
    assert not (folder / "o").exists() and not (folder / "ids.csv").exists()


def test_the_ending_of_a_file_says_the_format_of_identities(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main("export found told.json --samples samples.parquet".split()) == 0
    assert capsys.readouterr().out.startswith("Exported")
    assert {"id", "file_path"} == set(json.loads((folder / "told.json").read_text())[0])


@pytest.mark.parametrize("line, word", [
    ("pretrain --set backbone=resnet50_ibm", "no backbone 'resnet50_ibm'"),
    ("pretrain --set backbone=vit_tiny image_size=[50,31]", "cannot take 50x31 images"),
    ("pretrain --set global_scale=[1.0,0.4]", "global_scale=[1.0, 0.4]: 0 < smallest <= largest"),
    ("pretrain --set aspect=[2,1]", "ratio=[2, 1]"),
    ("pretrain --set batch_size=49", "not a multiple of n_id"),
    ("pretrain --set accumulate=5", "accumulate=5: must divide"),
    ("pretrain --set n_id_epochs=[0,99]", "would never come"),
    ("pretrain --set n_local=0 loss=moco view_changes={\"grey\":2}", "grey=2: chances lie in"),
    ("pretrain --set loss=moco", "MoCo compares two global views"),
    ("pretrain --set data={\"stage\":\"extract\"}", "only a world's is a data set"),
    ("finetune --set backbone=resnet50_ibm", "no backbone 'resnet50_ibm'"),
    ("finetune --set protocol=markt", "protocol 'markt' is not known; did you mean 'market'"),
    ("finetune --set test_data=market1502", "market1502"),
    ("finetune --set k=5", "not a multiple of k=5"),
    ("finetune --set overlap=true", "has no convolutional patch stem"),
    ("finetune --set jpm=true", "belong to method='transreid'"),
    ("finetune --set method=mgn backbone=vit_tiny", "MGN copies the last stages of a ResNet"),
    ("usl --set backbone=resnet50_ibm", "no backbone 'resnet50_ibm'"),
    ("usl --set protocol=markt", "did you mean 'market'"),
    ("usl --set images_per_epoch=100", "a multiple of batch_size=64 is needed"),
    ("usl --set k=7", "must be a multiple of k=7"),
    ("usl --set ghost_bn=60", "cannot be cut into such groups"),
    ("usl --set pooling=gem backbone=vit_tiny", "needs the map of a ResNet"),
    ("uda --set weights=null", "uda starts from a network fine-tuned on the source"),
    ("uda --set k=7", "must be a multiple of k=7"),
])
def test_a_check_refuses_what_the_run_would_refuse(line, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path))
    assert word in refusal(capsys, f"{line} --check")
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "usl", "uda"])
@pytest.mark.parametrize("profile", ["smoke", "tiny", "small"])
def test_a_check_lets_every_profile_pass(stage, profile, capsys):
    assert main([stage, "--profile", profile, "--check"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == stage


@pytest.mark.parametrize("line, word", [
    ("denoise x.npy . --out o", "is a folder: name the samples .parquet in it"),
    ("denoise . samples.parquet --out o", "is a folder: name the .npy file in it"),
    ("denoise x.npy x.npy --out o", "x.npy is not a parquet file"),
    ("denoise none.npy samples.parquet --out o", "no features at"),
    ("calibrate x.npy none.parquet", "no samples table at"),
    ("calibrate x.npy samples.parquet --json .", "is a folder, and a file is to be written"),
    ("calibrate x.npy samples.parquet --json x.npy/told.json", "x.npy is a file, a folder is needed"),
    ("score m --data samples.parquet --json .", "is a folder, and a file is to be written"),
    ("score m --data found", "found is a folder: name the samples .parquet in it"),
    ("extract found --model m --out o", "found is a folder: name the samples .parquet in it"),
    ("extract samples.parquet --model m --out x.npy", "x.npy is a file, a folder is needed"),
    ("export found x.csv --samples .", "is a folder: name the samples table"),
    ("export found x.csv --samples x.npy", "x.npy is no readable samples table: no parquet file"),
    ("export found x.npy/y.csv --samples samples.parquet", "x.npy is a file, a folder is needed"),
    ("pretrain --recipe .", "is a folder, a file is needed here"),
    ("reproduce --recipe .", "is a folder, a file is needed here"),
])
def test_a_folder_for_a_file_and_a_file_for_a_folder(folder, line, word, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    said = refusal(capsys, line)
    assert word in said and "Errno" not in said and "Parquet magic" not in said


@pytest.mark.parametrize("setting, word", [
    ("seeds=0", "'seeds' is 0: at least 1"), ("seeds=-1", "at least 1"), ("seeds=many", "of type int"),
    ("seeds=true", "of type int"), ("data=3", "of type str"), ("methods=4", "of type str"),
])
def test_parameters_of_pages_are_looked_at_before_anything_is_computed(setting, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path))
    assert word in refusal(capsys, f"reproduce --only table4 --set {setting}")


def test_pruning_nobody_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path))
    assert "is called nope" in refusal(capsys, "runs prune nope")
    assert main(["runs", "prune"]) == 0


def test_a_warning_is_one_line_and_told_once(monkeypatch, capsys):
    def warned(*names, **settings):
        for _ in range(2): warnings.warn("two\nlines", stacklevel=1)
        warnings.warn("another", RuntimeWarning, stacklevel=1)
        return 0
    monkeypatch.setattr("cion_nb.core.runs.prune_runs", warned)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["runs", "prune"]) == 0
    said = capsys.readouterr().err
    assert said == "cion_nb runs: warning: two lines\ncion_nb runs: warning: another\n"
    assert warnings.showwarning is before


def test_a_folder_that_another_process_writes_is_named(folder, tmp_path, capsys):
    out = tmp_path / "tree"
    with FileLock(tmp_path / ".tree.lock"):
        said = refusal(capsys, f"export {folder}/found {out} --samples {folder}/samples.parquet --format tracklets "
                               f"--root {folder}")
    assert f"another process is exporting to {out}" in said and not out.exists()


@pytest.mark.parametrize("value", ["False", "no", "1", "maybe"])
def test_tracklets_are_true_or_false(value, capsys):
    said = refusal(capsys, f"score model --data market1501 --set tracklets={value}")
    assert "score setting tracklets" in said and "true or false is needed" in said


def test_a_table_in_another_order_than_the_one_beside_its_features_is_refused(folder, tmp_path, capsys):
    store = tmp_path / "store"
    store.mkdir()
    for name in ("x.npy", "samples.parquet"):
        shutil.copy(folder / name, store / name.replace("x.npy", "features.npy"))
    (store / "features.json").write_text("{}")
    said = refusal(capsys, f"denoise {store}/features.npy {folder}/reversed.parquet --out {tmp_path}/o")
    assert "row 0 is" in said and str(store / "samples.parquet") in said and not (tmp_path / "o").exists()
    assert main(f"denoise {store}/features.npy {folder}/samples.parquet --out {tmp_path}/o --check".split()) == 0


def test_an_interruption_is_one_line(monkeypatch, capsys):
    from cion_nb.companion import commands

    def stopped(args): raise KeyboardInterrupt
    command = commands.COMMANDS["runs"]
    monkeypatch.setitem(commands.COMMANDS, "runs", dataclasses.replace(command, run=stopped))
    assert refusal(capsys, "runs", 130) == "cion_nb runs: stopped; the same command goes on from what is on the disk"


@pytest.mark.parametrize("line, word", [
    ("denoise {here}/nowhere --out o", "no features at"),
    ("reproduce --recipe {here}/nowhere.json", "no recipe at"),
    ("reproduce --recipe {here}/no_recipe.json", "is no recipe"),
    ("pretrain --recipe {here}/no_recipe.json", "is no recipe"),
    ("denoise {here}/x.npy {here}/samples.parquet --out {here}/x.npy --check", "x.npy"),
])
def test_what_is_not_there_or_something_else_is_named(folder, capsys, line, word):
    (folder / "no_recipe.json").write_text("{}")
    assert word in refusal(capsys, line.format(here=folder))

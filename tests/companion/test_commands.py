"""The one command: seeds, recipes, what it refuses before running, and errors of one line."""
import json
from pathlib import Path

import forked
import matplotlib
import numpy as np
import pytest
from trainings import asked, QUICK

from cion_nb.companion.commands import main
from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe

matplotlib.use("Agg")


@pytest.mark.parametrize("name", ["profile", "only"])
def test_a_parameter_that_has_its_own_flag_is_refused(name, capsys):
    assert main(["reproduce", "--set", f"{name}=road"]) == 2
    assert f"--set {name}: that is --{name}" in capsys.readouterr().err


def test_a_run_that_ends_in_nan_is_one_line(tmp_path, monkeypatch, capsys):
    def broken(recipe): raise FloatingPointError("the loss is nan")
    monkeypatch.setattr("cion_nb.companion.reproduce.make_run", broken)
    (tmp_path / "recipe.json").write_text('{"stage": "world"}')
    assert main(["reproduce", "--recipe", str(tmp_path / "recipe.json")]) == 1
    assert capsys.readouterr().err == "cion_nb reproduce: error: the loss is nan\n"


def told(capsys, *args):
    "What the command says where it refuses: its last line."
    try: code = main([str(a) for a in args])
    except SystemExit as e: code = e.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said, said
    return said.strip().splitlines()[-1]


@pytest.mark.slow("starts processes")
def test_what_is_wrong_is_told_in_one_line(people, runs, tmp_path, monkeypatch, capsys):
    "A busy run, a folder that cannot be written to, and a mistyped network before missing data."
    file, wanted = tmp_path / "recipe.json", asked(people, seed=17)
    file.write_text(json.dumps(wanted))
    with Run(wanted).computing():
        p = forked.run(["-m", "cion_nb", "pretrain", "--recipe", file])
    assert p.returncode == 2 and "Traceback" not in p.stderr, p.stderr
    assert "is being computed by another process" in p.stderr.strip().splitlines()[-1]
    name = Run(wanted).name
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "file"))
    assert "CION_NB_RUNS=" in told(capsys, "pretrain", "--recipe", file)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text("a file")
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "other"))
    assert f"{name} is a file where the folder of this run belongs" in told(capsys, "pretrain", "--recipe", file)
    file.write_text(json.dumps(recipe("pretrain", "tiny", backbone="resnet50_ibm")))
    assert "resnet50_ibn" in told(capsys, "pretrain", "--recipe", file)


@pytest.mark.parametrize("args,word", [(["--only", "table4", "--set", "sedes=3"], "did you mean 'seeds'"),
                                       (["--only", "tabel4"], "page 'tabel4' is not known; did you mean 'table4'"),
                                       (["--only", "table4", "--only", "nothing"], "page 'nothing' is not known"),
                                       (["--only", "table4", "--profile", "huge"], "invalid choice")])
def test_reproduce_refuses_before_running(args, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert word in told(capsys, "reproduce", *args)


def test_only_may_be_said_twice_and_a_page_is_made_once(tmp_path, monkeypatch):
    made = []
    def run(name, profile, **_):
        made.append(name)
        return dict(name=name, title=name, html=None, seconds=0., error=None, failed=[], parameters={})
    monkeypatch.setattr("cion_nb.companion.reproduce.run_notebook", run)
    for room in ("reproduce", "report"):
        monkeypatch.setattr(f"cion_nb.companion.{room}.report_folder", lambda profile: tmp_path)
    assert main(["reproduce", "--only", "table4", "figure4", "--only", "table4", "road"]) == 0
    assert made == ["table4", "figure4", "road"]


@pytest.mark.slow("trains networks")
def test_seeds_on_a_command_line(people, runs, capsys):
    settings = [f"{k}={json.dumps(v)}"
                for k, v in dict(data=str(people), backbone="resnet10_tiny_ibn", **QUICK).items()]
    done = forked.run(["-m", "cion_nb", "finetune", "--seeds", "2", "--set", *settings])
    assert done.returncode == 0, done.stderr
    *folders, said = done.stdout.strip().splitlines()
    results = [json.loads(Path(f, "result.json").read_text()) for f in folders]
    scores = [r["mAP"] for r in results]
    assert len({r["loss"] for r in results}) == 2 and said.startswith("seeds 0, 1")
    assert f"mAP {100 * np.mean(scores):.1f} ± {100 * np.std(scores, ddof=1):.1f}" in said
    assert "--seeds 0: at least 1" in told(capsys, "finetune", "--seeds", "0")


@pytest.mark.parametrize("line,word", [
    ("extract x.parquet --model m --out o --set flip=False", "flip='False': true or false is needed"),
    ("extract x.parquet --model m --out o --set batch_size=2.5", "batch_size=2.5: a whole number is needed"),
    ("export m n.onnx --set normalise=no", "there is no model"),
    ("export m n.onnx --format csv", "are for identities; this is a model"),
    ("score m --data w.parquet --set reranked=banana", "reranked='banana': true or false is needed"),
    ("score m --data w.parquet --protocol no_camera --set protocol=market", "protocol stands twice"),
    ("pretrain --set profile=tiny", "--set profile: a profile is no setting"),
    ("pretrain --recipe r.json --profile tiny", "--recipe brings its own profile"),
    ("reproduce --recipe r.json --only table4", "leave --only and --set out"),
    ("track nope.mp4 --out o", "nope.mp4"),
    ("runs list nobody", "nobody")])
def test_what_would_be_taken_wrongly_is_refused(line, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    (tmp_path / "r.json").write_text(json.dumps(recipe("pretrain", "smoke")))
    (tmp_path / "runs").mkdir()
    if word == "there is no model": word = "no model at"
    assert word in told(capsys, *line.split())


def test_a_damaged_run_hides_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path))
    for name, text in (("a", "{"), ("b", json.dumps(recipe("pretrain", "smoke"))), ("b.bak", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text(text)
    assert main(["runs"]) == 0
    said = capsys.readouterr().out
    assert "damaged" in said and "asked" in said
    assert main(["runs", "show", "b"]) == 0 and capsys.readouterr().out.startswith("b: asked"), "an exact name wins"

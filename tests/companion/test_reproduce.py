"""Pages of nbs/reproduce, run in this process on made-up runs: what one method loses, the others still show; the recipe
is run whole."""
import ast
import json
import os
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from places import ROOT

from cion_nb.companion import comparisons, families, mechanism, reproduce as room
from cion_nb.companion.commands import main
from cion_nb.companion.reproduce import Page, settings_of, STAGES
from cion_nb.core.runs import dependencies, Run
from cion_nb.core.settings import recipe
from cion_nb.core.store import Features
from cion_nb.data.film import make_world

matplotlib.use("Agg")

PAGES = sorted((ROOT / "nbs" / "reproduce").glob("*.ipynb"))


def code_cells(path):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def execute(name, until=None, profile="smoke", **parameters):
    """The namespace of a page after its code cells; `box` is that of its verdicts. `until`: words of the first cell
    that is not run.
    """
    names = {"__name__": "page", "display": lambda x: None}
    for cell in code_cells(ROOT / "nbs" / "reproduce" / f"{name}.ipynb"):
        source = "".join(cell["source"])
        if until and until in source: break
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        shown = eval(compile(ast.Expression(last.value), name, "eval"), names) if last else None
        if "failed" in (getattr(shown, "metadata", None) or {}): names["box"] = shown
        if "parameters" in cell["metadata"].get("tags", []): names |= dict(profile=profile) | parameters
    plt.close("all")
    return names


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Stages that end at once with scores by method; methods whose names are put into the set that this gives end with
    a nan.
    """
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CION_NB_PROGRESS", "0")
    monkeypatch.setenv("CION_NB_JOBS", "1")
    broken = set()
    def stage(r):
        run = Run(r)
        for needed in dependencies(r): Run(needed).require()
        if r.get("method") in broken: raise FloatingPointError("the loss is nan at image 96")
        with run.computing():
            worth = .3 + .1 * (r.get("method") == "cion" or any(d.get("method") == "cion" for d in dependencies(r)))
            run.finish(dict(mAP=worth, rank1=worth, mINP=worth, images=192, train_images=96, identities=8, views=4,
                            train_seconds=1., alarms=[], device="cpu"))
        return run
    for name in STAGES: monkeypatch.setitem(STAGES, name, stage)
    def frozen(run, *_):
        rng = np.random.default_rng(len(run.name))
        pid = np.repeat(np.arange(1, 9), 6)
        table = pd.DataFrame(dict(pid=pid, camid=np.tile([1, 2, 3], 16),
                                  split=np.where(np.arange(48) % 6 == 0, "query", "gallery")))
        x = np.eye(8)[pid - 1] + .8 * rng.standard_normal((48, 8))
        return SimpleNamespace(samples=table, x=(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))
    monkeypatch.setattr(comparisons, "frozen_features", frozen)
    return broken


@pytest.mark.parametrize("name,arm",
                         [("figure4", "lup"), ("table4", "lup"), ("figure5", "tracklet"), ("figure6", "cion"),
                          ("table1", "cion"), ("figure7", "cion")])
def test_a_method_that_fails_is_named_and_the_page_is_made(made_up, name, arm):
    made_up.add(arm)
    page = execute(name)
    failed = page["box"].metadata["failed"]
    assert any("the loss is nan" in line for line in failed) and "since it failed" in page["box"].data
    if arm == "lup":
        found = page["found"]
        others = [v for v in found["verdicts"] if "lup" not in v.lower()]
        assert set(found["rows"].method) >= {"cion"} and arm not in set(found["rows"].method)
        assert others and all("1 seed" in v for v in others), "what is there is compared"
        assert all("not resolved: lup failed (" in v for v in found["verdicts"] if v not in others)


def test_a_page_with_nothing_left_to_show_says_why(made_up):
    made_up.update(("lup", "tracklet", "cion"))
    with pytest.raises(RuntimeError, match="nothing is left to show on figure4: lup, seed 0: FloatingPointError"):
        execute("figure4")


def test_a_page_without_failures_is_complete(made_up):
    assert execute("figure4")["box"].metadata == dict(failed=[])


def test_a_folder_that_cannot_be_written_and_a_collapse_are_named(made_up, tmp_path):
    broken, alarmed = recipe("world", "smoke"), recipe("pretrain", "smoke", method="dino")
    Run(broken).folder.parent.mkdir(parents=True)
    Run(broken).folder.write_text("a file where the run's folder should be")
    page = Page("table4", "smoke")
    assert not page.runs({("A", 0): broken}) and "Error" in page.failed["A", 0]
    Run(broken).folder.unlink()
    page = Page("table4", "smoke")
    page.runs({("dino", 0): alarmed})
    result = Run(alarmed).result | dict(alarms=["feature_rank"])
    (Run(alarmed).folder / "result.json").write_text(json.dumps(result))
    page.runs({("dino", 0): alarmed})
    assert "dino, seed 0 collapsed: alarm feature_rank" in page.finish([]).data


@pytest.fixture
def reports(tmp_path, monkeypatch):
    from cion_nb.companion import report
    for module in (report, room):
        monkeypatch.setattr(module, "report_folder", lambda profile: tmp_path / "reports" / profile)
    return tmp_path / "reports"


def test_reproduce_goes_on_and_its_index_and_exit_code_say_what_is_missing(reports, monkeypatch, capsys):
    "A page that fails, a kernel that dies, a page in part: the next one is made all the same."
    import nbformat
    import papermill
    from nbformat.v4 import new_code_cell, new_notebook, new_output
    def run(path, out, **_):
        name = Path(path).stem
        if name == "figure4": raise RuntimeError("Kernel died")
        if name == "table2": raise papermill.PapermillExecutionError(0, 1, "", "ValueError", "unequal budget", [])
        failed = ["lup, seed 0: FloatingPointError: the loss is nan"] if name == "table4" else []
        output = new_output("execute_result", {"text/markdown": "*"}, metadata={"text/markdown": dict(failed=failed)},
                            execution_count=1)
        nbformat.write(new_notebook(cells=[new_code_cell("page", outputs=[output])]), out)
    monkeypatch.setattr(papermill, "execute_notebook", run)
    assert main(["reproduce", "--profile", "smoke", "--only", "figure4", "table4", "table2", "order"]) == 1
    said, index = capsys.readouterr().out, (reports / "smoke" / "index.html").read_text()
    assert "2 of 4 pages made, in part, since something failed: table4; not made: figure4, table2" in said
    for word in ("Kernel died", "unequal budget", "partial, without:", "the loss is nan"): assert word in index
    assert (reports / "smoke" / "order.html").exists() and not (reports / "smoke" / "figure4.html").exists()
    assert main(["reproduce", "--profile", "smoke", "--only", "table4"]) == 0, "a page in part is a page"


# The recipe is run whole

CHANGES = dict(sigma_cst=.41, sigma_drm=.33, half_width=7, levels=["video", "cross"], link="reciprocal", k1=7, k2=2,
               eps=.31, min_samples=3, centre="video", cannot_link="frames")


def test_changes_cover_every_setting_of_denoising():
    usual = settings_of(recipe("denoise", "smoke"))
    assert set(CHANGES) == set(usual) and all(CHANGES[k] != usual[k] for k in usual)


def test_denoising_page_honours_every_setting(made_up, monkeypatch):
    "At `small` it once took four of eleven settings, and two in its last part."
    real, plain, asked = mechanism.denoise, recipe, []
    monkeypatch.setattr(mechanism, "denoise", lambda x, samples, **settings: asked.append(settings)
                        or real(x, samples, **settings))
    monkeypatch.setattr(
        mechanism, "recipe",
        lambda stage, *a, **k: plain(stage, *a, **k) | (CHANGES if stage == "denoise" else {}))
    def open_features(folder):
        r = json.loads((Path(folder) / "recipe.json").read_text())["data"]
        samples = make_world(r["size"], r["seed"], bank=r["bank"], **r["values"]).tracklets.reset_index(drop=True)
        x = (np.random.default_rng(0).normal(size=(samples.true_pid.max() + 2, 32))[samples.true_pid.clip(0)]
             + np.random.default_rng(1).normal(scale=.5, size=(len(samples), 32)))
        return SimpleNamespace(samples=samples, x=x)
    monkeypatch.setattr(Features, "open", staticmethod(open_features))
    page = execute("denoising")
    assert len(asked) > 5 and not page["box"].metadata["failed"]
    for settings in asked:
        for key, value in CHANGES.items():
            assert settings[key] == value or key == "half_width" and settings.get("measure") is False, (
                f"{key} is {settings[key]!r} where the recipe says {value!r}")
    note = next(n for n in page["found"]["notes"] if n.startswith("Denoising with"))
    assert all(f"{key} {'+'.join(v) if isinstance(v, list) else v}" in note for key, v in CHANGES.items())


def test_no_page_picks_settings_of_denoising_by_hand():
    for path in PAGES:
        for cell in code_cells(path):
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "denoise"): continue
                assert any(k.arg is None and "settings_of(" in ast.unparse(k.value) for k in node.keywords), (
                    f"{path.stem}: {ast.unparse(node)}")


def test_every_page_goes_through_page():
    for path in PAGES:
        text = "".join("".join(c["source"]) for c in code_cells(path))
        assert (f'Page("{path.stem}"' in text and "page.finish(" in text and "make_runs" not in text
                and "write_report(" not in text), path.stem


@pytest.mark.parametrize("profile", ["tiny", "small"])
def test_table3_takes_no_learning_rate_that_its_text_calls_broken(profile):
    def asked(arch, start): return families.pair_recipe(profile, arch, start, seed=0)
    for arch in ("resnet18", "convnext_tiny"):
        tuned = asked(arch, "cion")
        step = tuned["lr"] * tuned["batch_size"] / tuned["lr_per"]
        if arch == "resnet18":
            assert (tuned["optimizer"], tuned["lr"], tuned["weights"]["lr"], tuned["weights"]["teacher_temp"]) == (
                "sgd", .1, .002, .06)
        else:
            assert tuned["optimizer"] == "adam" and np.isclose(step, 1e-3)
            assert (tuned["weights"]["lr"], tuned["weights"]["teacher_temp"]) == (.0005, .04)
        without = asked(arch, "without")
        assert {k: v for k, v in tuned.items() if k != "weights"} == {
            k: v for k, v in without.items() if k != "weights"}, "both arms are fine-tuned alike"


def test_two_pages_at_once_and_timed_ones_alone(monkeypatch, tmp_path):
    "All pages are made once; those that measure seconds come last, while nothing else is at work."
    import threading
    import time
    at_work, seen, lock = set(), [], threading.Lock()
    def run(name, profile, **parameters):
        with lock:
            at_work.add(name)
            seen.append((name, frozenset(at_work)))
        time.sleep(.02)
        with lock: at_work.discard(name)
        return dict(name=name, seconds=.02, error=None, failed=[])
    monkeypatch.setattr(room, "run_notebook", run)
    names = list(room.TITLES)
    for n in (1, 2):
        seen.clear()
        monkeypatch.setattr(room, "lanes", lambda profile: n)
        made = [entry["name"] for entry in room._pages(names, "tiny", {})]
        assert sorted(made) == sorted(names) and max(len(beside) for _, beside in seen) == n
        if n == 1: assert made == names
        else: assert set(made[-2:]) == set(room.TIMED)
        for name, beside in seen: assert name not in room.TIMED or beside == {name}


def test_a_page_that_trains_alone_has_all_cores(monkeypatch):
    "One page that is asked for by itself, and a sister system's that computes: neither leaves a core for another page."
    seen = {}
    def run(name, profile, **parameters):
        seen[name] = os.environ.get("CION_NB_LANES", "1"), parameters.get("compute", False)
        return dict(name=name, seconds=.02, error=None, failed=[])
    monkeypatch.setattr(room, "run_notebook", run)
    monkeypatch.setattr(room, "lanes", lambda profile: 2)
    assert len(list(room._pages(["road"], "tiny", {}))) == 1 and seen == dict(road=("1", False))
    made = [entry["name"] for entry in room._pages(["denseil_variants", "road", "table1"], "tiny", {}, everything=True)]
    assert made[-1] == "denseil_variants"
    assert seen == dict(road=("2", False), table1=("2", False), denseil_variants=("1", True))
    assert "about" in room.plan_text(["denseil_variants"], "tiny", True)


def test_the_plan_says_what_and_how_long(monkeypatch):
    monkeypatch.setattr(room, "lanes", lambda profile: 2)
    said = room.plan_text(["claims", "road"], "tiny")
    assert said.startswith("2 pages at tiny: claims, road") and "about 1 min" in said
    assert "about" not in room.plan_text(["claims"], "small")
    weights = room.expected([*room.TITLES, "unheard of"], "tiny")
    assert all(value > 0 for value in weights.values()) and weights["figure4"] > weights["claims"]


def test_a_run_that_another_page_computes_is_waited_for(monkeypatch, tmp_path):
    "Without $CION_NB_WAIT it is an error, as before; with it the second finds the run done."
    import threading
    run, began = Run(dict(stage="net", profile="test"), tmp_path / "run"), threading.Event()
    def compute():
        with Run(run.recipe, run.folder).computing() as todo:
            began.set()
            assert todo
            wait.wait(5)
            run.finish(dict(x=1))
    wait, thread = threading.Event(), threading.Thread(target=compute)
    thread.start()
    began.wait(5)
    with pytest.raises(RuntimeError, match="being computed by another"):
        with Run(run.recipe, run.folder).computing(): pass
    monkeypatch.setenv("CION_NB_WAIT", "-1")
    threading.Timer(.1, wait.set).start()
    with Run(run.recipe, run.folder).computing() as todo: assert not todo
    thread.join()


def test_kernels_are_told_what_is_beside_them(monkeypatch):
    import os
    monkeypatch.setenv("CION_NB_PROGRESS", "5")
    with room._beside(CION_NB_LANES="2"):
        assert [os.environ[f"CION_NB_{name}"] for name in ("PROGRESS", "WAIT", "LANES")] == ["0", "-1", "2"]
    assert os.environ["CION_NB_PROGRESS"] == "5" and not {"CION_NB_WAIT", "CION_NB_LANES"} & set(os.environ)

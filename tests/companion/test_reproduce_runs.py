"""Runs that a table needs: dependencies first, several at once, what fails is named; a backbone goes the whole road."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import rounding
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from places import ROOT
from trainings import asked

from cion_nb.companion import reproduce as reproduce_room
from cion_nb.companion.reproduce import make_runs, plan, STAGES
from cion_nb.core.runs import MissingRun, Run
from cion_nb.core.settings import recipe, table5
from cion_nb.models.backbones import load_backbone
from cion_nb.models.features import OnnxModel
from cion_nb.models.leaving import export_onnx
from cion_nb.training.finetune import finetune, load_finetuned
from cion_nb.training.pretrain import pretrain
from cion_nb.training.views import normalise


@pytest.mark.slow("trains networks")
def test_make_run_computes_dependencies_first(runs, monkeypatch):
    order = []
    def fake(stage):
        def run_it(r):
            run = Run(r)
            for needed in (v for v in r.values() if isinstance(v, dict) and "stage" in v): Run(needed).require()
            with run.computing():
                order.append((stage, r.get("method")))
                run.finish({})
            return run
        return run_it
    for stage in STAGES: monkeypatch.setitem(STAGES, stage, fake(stage))
    asked = [recipe("finetune", "tiny", weights=recipe("pretrain", "tiny", method=m)) for m in ("dino", "cion")]
    listed = plan(asked)
    make_runs(asked, jobs=1)
    assert len(order) == len(listed) == len(set(listed.run))
    assert [s for s, _ in order] == listed.stage.tolist(), "runs are computed in the order of the plan"
    make_runs(asked, jobs=1)
    assert len(order) == len(listed), "nothing is computed twice"


@pytest.mark.slow("trains networks")
def test_paper_profile_prints_commands_instead_of_running(runs, capsys):
    r = recipe("pretrain", "paper", data_root="/nowhere", annotation="/nowhere.json")
    done = make_runs([r])
    said = capsys.readouterr().out
    assert not done[0].is_done and "accelerate launch -m cion_nb pretrain --recipe" in said
    assert "was not named" not in said
    assert json.loads(Path(said.split("--recipe ")[1].strip()).read_text()) == r
    with pytest.raises(MissingRun): Run(r).require()
    make_runs([recipe("finetune", "paper", weights=recipe("pretrain", "paper"))])
    said = capsys.readouterr().out
    assert "was not named" in said and said.index("cion_nb pretrain") < said.index("cion_nb finetune"), (
        "what is needed first is printed first")


@pytest.mark.parametrize("name,value,word",
                         [("profil", "tiny", "did you mean 'profile'"), ("seeds", "five", "of type int"),
                          ("seeds", "0", "at least one"), ("profile", "huge", "smoke, tiny, small, paper")])
def test_a_mistyped_parameter_fails_the_notebook(name, value, word, monkeypatch):
    "Given where papermill puts them."
    monkeypatch.setattr(reproduce_room.Page, "runs", lambda *a, **k: pytest.fail("the page went on"))
    given = {name: int(value) if value.isdigit() else value}
    cells = parameterize_notebook(load_notebook_node(str(ROOT / "nbs/reproduce/table4.ipynb")), given).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    names = {"__name__": "page", "In": code}                           # as a kernel has them
    with pytest.raises((ValueError, TypeError), match=word):
        for source in code: exec(source, names)


# Trainings beside one another

@pytest.fixture
def workers(monkeypatch):
    "Workers of `make_runs` are forks, and every training is worth one."
    monkeypatch.setattr(sys, "executable", forked.executable())
    monkeypatch.setattr(reproduce_room, "WORTH_A_PROCESS", 1)


def beside(people, **changes): return [asked(people, "tracklet", seed=s, **changes) for s in range(3)]


@pytest.mark.slow("trains networks")
def test_trainings_beside_one_another_end_as_alone(people, runs, workers, monkeypatch):
    before = torch.get_num_threads()
    together = make_runs([*beside(people), recipe("finetune", "tiny", data=str(people), epochs=1, images_per_epoch=32,
                                                  batch_size=16, weights=beside(people)[0], channels_last=False)],
                         jobs=2)
    assert all(r.is_done for r in together) and all((r.folder / "process.log").exists() for r in together)
    threads = together[0].result["threads"]
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else threads >= 1
    monkeypatch.setenv("CION_NB_RUNS", str(runs.parent / "alone"))
    torch.set_num_threads(threads)
    try: alone = make_runs(beside(people), jobs=1)
    finally: torch.set_num_threads(before)
    assert not (alone[0].folder / "process.log").exists()
    for a, b in zip(together, alone):
        assert a.folder != b.folder and a.name == b.name and a.result["loss"] == b.result["loss"]
        assert (a.folder / "backbone.safetensors").read_bytes() == (b.folder / "backbone.safetensors").read_bytes()


@pytest.mark.slow("starts processes")
def test_a_training_that_fails_beside_others_is_named(people, runs, workers):
    wrong = asked(people, batch_size=20, n_id=[3], n_id_epochs=[0], seed=5)
    with pytest.raises(RuntimeError, match=f"run {Run(wrong).name} failed .exit code [12].*process.log"):
        make_runs([wrong, *beside(people, images_per_epoch=2400)], jobs=2)
    assert not Run(wrong).is_done
    time.sleep(.5)
    assert not subprocess.run(["pgrep", "-f", str(runs)], capture_output=True, text=True).stdout, (
        "a child was left behind")


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_goes_on_without_what_failed(people, runs, workers, jobs):
    wrong = asked(people, batch_size=20, n_id=[3], n_id_epochs=[0], seed=5)
    needs_it = recipe("finetune", "tiny", data=str(people), epochs=1, images_per_epoch=32, batch_size=16, weights=wrong)
    page = reproduce_room.Page("table4", "tiny")
    done = page.runs({("needs it", 0): needs_it} | {("beside", s): r for s, r in enumerate(beside(people))}, jobs=jobs)
    assert list(done) == [("beside", s) for s in range(3)]
    assert page.failed["needs it", 0].startswith(f"it needs {Run(wrong).name}, which failed: ")
    assert len(page.failed) == 1


@pytest.mark.slow("starts processes")
def test_children_leave_with_their_parent(people, runs, tmp_path):
    "The parent is killed, the children checkpoint and go, and the next call goes on from there."
    long = beside(people, images_per_epoch=4800)[:2]
    script = tmp_path / "parent.py"
    script.write_text(f"import sys\nfrom cion_nb.companion import reproduce as room\n"
                      f"sys.executable = {forked.executable()!r}\nroom.make_runs({long!r}, jobs=2)\n")
    parent = forked.start([script], env=os.environ | dict(CION_NB_RUNS=str(runs)), stdout=None, stderr=None)
    until = time.time() + 180
    while time.time() < until and not all(Run(r).read_log() for r in long): time.sleep(.2)
    parent.kill()
    parent.wait()
    until = time.time() + 90                                    # a busy machine took the time of both for the first
    while time.time() < until and subprocess.run(["pgrep", "-f", str(runs)], capture_output=True).stdout: time.sleep(.2)
    for r in long:
        assert not Run(r).is_done and list((Run(r).folder / "checkpoints").glob("seen-*")), (
            Run(r).folder / "process.log").read_text()
        assert "stopped at image" in (Run(r).folder / "process.log").read_text()


@pytest.mark.parametrize("said", ["0", "two", -1, 1.5])
def test_how_many_at_once_is_checked(said, monkeypatch):
    with pytest.raises(ValueError, match="at least 1"): reproduce_room.at_once(said)
    monkeypatch.setenv("CION_NB_JOBS", str(said))
    with pytest.raises(ValueError, match="CION_NB_JOBS"): reproduce_room.at_once()
    assert reproduce_room.at_once(3) == 3


# From nothing to a file that leaves, for every backbone

ROAD = table5().arch.tolist() if os.environ.get("CION_NB_ROAD_ALL") else ["ghostnet_0_5", "edgenext_x_small"]


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("arch", ROAD)
def test_a_backbone_goes_the_whole_road(people, runs, arch, tmp_path):
    """Pre-train a step, load, fine-tune a step, export to ONNX and read it back. CION_NB_ROAD_ALL=1: all 32, at 256x128
    (slow).
    """
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    size, local = ([256, 128], [128, 64]) if os.environ.get("CION_NB_ROAD_ALL") else ([128, 64], [64, 32])
    pre = pretrain(asked(people, "cion_true", backbone=arch, image_size=size, local_size=local, epochs=1,
                         images_per_epoch=4, batch_size=4, n_id=[2], n_id_epochs=[0], channels_last=True))
    load_backbone(pre.folder / "backbone.safetensors")
    run = finetune(recipe("finetune", "tiny", data=str(people), weights=pre.recipe, backbone=arch, image_size=size,
                          epochs=1, images_per_epoch=8, batch_size=8, k=2, warmup_epochs=0, precision="fp32"))
    assert run.result["matched"] == sum("num_batches" not in k
                                        for k in load_backbone(pre.folder / "backbone.safetensors").state_dict())
    assert np.isfinite(run.result["mAP"])
    tuned = load_finetuned(run.folder)
    # after a step features hardly differ between images, least of all RepViT's
    report = export_onnx(tuned, tmp_path / "m.onnx", tolerance=max(1e-3, 20 * rounding(tuned, size)))
    x = torch.randint(0, 256, (3, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.inference_mode(): want = tuned(normalise(x, tuned.input))
    torch.testing.assert_close(F.normalize(OnnxModel(tmp_path / "m.onnx", report.input)(x.float())), F.normalize(want),
                               atol=1e-4, rtol=0)
    print(f"| {arch} | {report.relative:.1e} | {report.megabytes:.1f} |")

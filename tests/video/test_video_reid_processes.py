"""Two processes: the batches of one, the loss of one, one finished run by the command; its job script."""
import json
import os
import signal
import subprocess

import forked
import numpy as np
import pytest
from places import ROOT

from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe
from cion_nb.models.backbones import create_backbone, save_backbone
from cion_nb.video.video_reid import VideoFineTuning

QUICK = dict(method="dense", epochs=2, images_per_epoch=32, batch_size=8, k=4, frames=2, width=16, heads=2, blocks=1,
             warmup_epochs=0, drops=[1.], precision="fp32", channels_last=False)
RANKS = dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CION_NB_PROGRESS="0")


@pytest.fixture
def asked(walkers, tmp_path, monkeypatch):
    "A recipe whose rank has the clips of one person alone, and its folder of runs."
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)), tmp_path / "run" / "backbone.safetensors")
    return recipe("video_reid", "tiny", data=str(walkers), weights=str(tmp_path / "run"), **QUICK)


LOSS = """
import json, sys, torch
from accelerate import Accelerator
from cion_nb.video.video_reid import VideoFineTuning
a, task = Accelerator(cpu=True), VideoFineTuning(json.load(open(sys.argv[1])))
torch.manual_seed(0)
task.build("cpu")
model = a.prepare(task.modules["model"])
task.modules["model"].neck.eval()                                        # a process has statistics of its own
rows = next(iter(task.sampler(0, 0, 0, a.process_index, a.num_processes)))
loss, told = task.loss(model, task.load(rows, 0), a)
a.backward(loss)
mean = a.reduce(loss.detach(), "mean"); grad = task.modules["model"].backbone.blocks[0].feedforward[0].weight.grad
if a.is_main_process: print(json.dumps([float(mean), float(told["triplet"]), *grad.flatten()[:50].tolist()]))
"""


@pytest.mark.slow("starts processes")
def test_two_processes_have_the_clips_the_loss_and_the_gradient_of_one(asked, tmp_path):
    task = VideoFineTuning(asked)
    for n_pass in range(3):
        whole, *parts = (list(task.sampler(0, n_pass, 0, *who)) for who in ((0, 1), (0, 2), (1, 2)))
        assert np.array_equal(whole, np.concatenate(parts, 1))
        assert all(len(set(task.labels[np.searchsorted(task.clips.table.first_row, rows)])) == 1 for rows in parts[0])
    (tmp_path / "loss.py").write_text(LOSS)
    (tmp_path / "recipe.json").write_text(json.dumps(asked))
    command, found = [tmp_path / "loss.py", tmp_path / "recipe.json"], []
    for p in (forked.run(command, env=os.environ | RANKS), forked.run_ranks(2, command, env=os.environ | RANKS)):
        assert p.returncode == 0, p.stderr[-3000:]
        found.append(json.loads([line for line in p.stdout.splitlines() if line.startswith("[")][-1]))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
    assert np.abs(found[0][2:]).max() > 0


@pytest.mark.slow("starts processes")
def test_two_processes_end_in_one_run(asked, tmp_path):
    asked |= dict(method="self")                              # of which levels rest
    (tmp_path / "recipe.json").write_text(json.dumps(asked))
    p = forked.run_ranks(2, ["-m", "cion_nb", "video_reid", "--recipe", tmp_path / "recipe.json"],
                         env=os.environ | RANKS)
    assert p.returncode == 0, p.stderr[-3000:]
    run = Run(asked)
    assert p.stdout.split() == [str(run.folder)] and run.result["processes"] == 2
    assert run.result["images"] == 64 and 0 < run.result["mAP"] <= 1
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [run.name]


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize("args, word", [((), "submitted slurm/video_reid.sh profile=smoke"), (("k=3",), "k=3"),
                                        (("sead=1",), "did you mean 'seed'")])
def test_the_job_script_looks_before_it_submits(args, word):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))} | RANKS | dict(
        SBATCH="echo submitted", PYTHON=forked.executable(), PYTHONPATH=str(ROOT), SETTINGS="/dev/null/none",
        DEVICE="cpu")
    p = subprocess.run(["bash", "slurm/video_reid.sh", "profile=smoke", "method=mean", *args], cwd=ROOT, env=env,
                       capture_output=True, text=True, timeout=120)
    assert word in p.stdout + p.stderr and p.returncode == (2 if args else 0), p.stderr


DIES = """
import json, os, signal, sys
from cion_nb.video.video_reid import video_reid, VideoFineTuning
def dies(self, share):
    if share >= .4: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "dies": VideoFineTuning.after_step = dies
video_reid(json.load(open(sys.argv[1])))
"""


@pytest.mark.slow("starts processes")
def test_a_run_that_got_sigkill_ends_in_the_same_bits(asked, tmp_path):
    asked |= dict(checkpoint_minutes=0)
    (tmp_path / "dies.py").write_text(DIES)
    (tmp_path / "recipe.json").write_text(json.dumps(asked))
    def start(runs, how):
        env = os.environ | RANKS | dict(CION_NB_RUNS=str(tmp_path / runs))
        return forked.run([tmp_path / "dies.py", tmp_path / "recipe.json", how], env=env)
    assert start("runs", "dies").returncode == -signal.SIGKILL and not Run(asked).is_done
    for runs in ("runs", "through"):
        p = start(runs, "lives")
        assert p.returncode == 0, p.stderr[-3000:]
    through = Run(asked, tmp_path / "through" / Run(asked).name)
    assert (Run(asked).result["resumed"], through.result["resumed"]) == (1, 0)
    for name in ("clips.safetensors", "test-features/features.npy"):
        assert (Run(asked).folder / name).read_bytes() == (through.folder / name).read_bytes(), name

"""Two processes of a training on frames: negatives of both are those of one process; a kill leaves no trace."""
import json
import os

import forked
import numpy as np
import pytest

from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe
from cion_nb.detection.idfree import IdFree

QUICK = dict(image_size=[64, 96], channels=8, dim=8, epochs=2, images_per_epoch=12, batch_size=4, lr_per=4, drops=[1.],
             precision="fp32", channels_last=False, workers=0)
RANKS = dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CION_NB_PROGRESS="0")


@pytest.fixture
def asked(street, tmp_path, monkeypatch):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    return recipe("idfree", "tiny", data=str(street), **QUICK)


LOSS = """
import json, sys, torch
from accelerate import Accelerator
from cion_nb.detection.idfree import IdFree
a, asked, found = Accelerator(cpu=True), json.load(open(sys.argv[1])), []
for gather in (True, False):
    task = IdFree(asked | dict(gather=gather))
    torch.manual_seed(0)
    task.build("cpu")
    net = task.modules["model"].eval()                                # a process has statistics of its own
    model, head = a.prepare(net), net.net.heads["embedding"]
    rows = next(iter(task.sampler(0, 0, 0, a.process_index, a.num_processes)))
    loss, told = task.loss(model, task.load(rows, 0), a)
    a.backward(loss)                                                  # the head's gradient is of the identities alone
    mean = float(a.reduce(told["identity"], "mean"))
    found.append([mean, *head[0].weight.grad.flatten()[:200:4].tolist(), *head[2].weight.grad.flatten()[:80].tolist()])
if a.is_main_process: print(json.dumps(found))
"""


@pytest.mark.slow("starts processes")
def test_gathered_negatives_are_those_of_one_process(asked, tmp_path):
    "Loss and gradient of the embeddings; without `gather` each process has its own negatives, which is another loss."
    task = IdFree(asked)
    for n_pass in range(2):
        whole, *parts = (list(task.sampler(0, n_pass, 0, *who)) for who in ((0, 1), (0, 2), (1, 2)))
        for batch, one, two in zip(whole, *parts, strict=True): assert sorted(batch) == sorted([*one, *two])
    (tmp_path / "loss.py").write_text(LOSS)
    (tmp_path / "recipe.json").write_text(json.dumps(asked))
    command, found = [tmp_path / "loss.py", tmp_path / "recipe.json"], []
    for p in (forked.run(command, env=os.environ | RANKS), forked.run_ranks(2, command, env=os.environ | RANKS)):
        assert p.returncode == 0, p.stderr[-3000:]
        found.append(json.loads([line for line in p.stdout.splitlines() if line.startswith("[[")][-1]))
    (joined, alone), (gathered, own) = found
    np.testing.assert_allclose(gathered, joined, rtol=1e-4, atol=1e-7)
    assert joined == alone and np.abs(joined[1:]).max() > 0
    assert abs(own[0] - joined[0]) > .01, "fewer negatives"


DIES = """
import json, os, signal, sys
from cion_nb.detection.idfree import IdFree, idfree
real = IdFree.after_step
def dies(self, share):
    real(self, share)
    if share >= .5: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "dies": IdFree.after_step = dies
idfree(json.load(open(sys.argv[1])))
"""


@pytest.mark.slow("starts processes")
def test_two_processes_that_got_sigkill_end_in_the_same_bits(asked, tmp_path):
    "With a memory and a queue that both fill and that the loss reads: the network is that of a run that went through."
    asked |= dict(checkpoint_minutes=0, loss="memory", method="memory", queue=7, epochs=1)
    (tmp_path / "dies.py").write_text(DIES)
    (tmp_path / "recipe.json").write_text(json.dumps(asked))
    def start(runs, how):
        env = os.environ | RANKS | dict(CION_NB_RUNS=str(tmp_path / runs))
        return forked.run_ranks(2, [tmp_path / "dies.py", tmp_path / "recipe.json", how], env=env)
    assert start("runs", "dies").returncode and not Run(asked).is_done
    for runs in ("runs", "through"):
        p = start(runs, "lives")
        assert p.returncode == 0, p.stderr[-3000:]
    through = Run(asked, tmp_path / "through" / Run(asked).name)
    told = Run(asked).result, through.result
    assert (told[0]["resumed"], told[1]["resumed"]) == (1, 0) and told[0]["processes"] == 2
    name = "pointid.safetensors"
    assert (Run(asked).folder / name).read_bytes() == (through.folder / name).read_bytes()

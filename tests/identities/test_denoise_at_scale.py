"""Kills, shards and an array of jobs: what must not change a label. Real processes, since that is what gets killed."""
import os
import signal
import subprocess
import time

import forked
import numpy as np
import pandas as pd
import pytest
from places import ROOT

from cion_nb.companion.commands import main
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities import denoise as module, parts
from cion_nb.identities.denoise import denoise, denoise_shard, Denoised

ENV = os.environ | dict(CION_NB_PROGRESS="0", OMP_NUM_THREADS="1")


def command(folder, out, *more):
    return ["-m", "cion_nb", "denoise", str(folder / "features.npy"), str(folder / "samples.parquet"),
            "--out", str(out), "--set", "measure=false", *more]


JOB = """
import sys
import numpy as np, pandas as pd
from cion_nb.identities import parts
from cion_nb.identities.denoise import denoise
parts.PART_ROWS = 3000, 3000
parts.chunks_of = lambda m, half_width, pairs=0: [(i, min(i + 500, m)) for i in range(0, m, 500)]
x, samples = np.load(sys.argv[1] + "/features.npy", mmap_mode="r"), pd.read_parquet(sys.argv[1] + "/samples.parquet")
denoise(x[:9], samples[:9]); print("begin", flush=True)
denoise(x, samples, out=sys.argv[2], measure=False, workers=1)
print("end", flush=True)
"""


@pytest.mark.slow("starts processes")
def test_killed_at_six_moments(world, tmp_path):
    "SIGKILL when so many pieces lie on disk, on any machine; the work goes on each time, and is let to its end."
    folder, _, _, want = world
    out, left = tmp_path / "out", []
    def pieces(): return len(list((out / "denoise_work").glob("*.npz")))

    def start(out):
        p = forked.start(["-c", JOB, folder, out], env=ENV, stderr=None)
        assert p.stdout.readline() == "begin\n"
        return p

    for goal in np.sort(np.random.default_rng(0).choice(np.arange(1, 50), 6, replace=False)):
        p = start(out)
        while pieces() < goal and p.poll() is None: time.sleep(.001)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert p.returncode == -signal.SIGKILL and not (out / "denoised.json").exists()
        left.append(pieces())
    assert left == sorted(left) and left[0] < left[-1], left
    p = start(out)
    assert p.stdout.readline() == "end\n"
    p.wait()
    got = Denoised.load(out)
    assert np.array_equal(got.labels, want.labels) and not (out / "denoise_work").exists()
    for name in ("provenance", "tracklets", "links"):
        pd.testing.assert_frame_equal(getattr(got, name), getattr(want, name), check_exact=True)
    assert not [f for f in out.rglob("*") if f.name.startswith(".")]


@pytest.mark.slow("eleven thousand tracklets")
@pytest.mark.parametrize("stop_at", (0, 1, 9, 17, 18, 20))
def test_stopped_after_each_piece(world, tmp_path, monkeypatch, stop_at):
    "The moments between pieces, exactly: the n-th piece is written, then the process is gone."
    _, x, samples, want = world
    monkeypatch.setattr(
        parts, "chunks_of", lambda m, half_width, pairs=0: [(i, min(i + 1500, m)) for i in range(0, m, 1500)])
    real, written = parts.Store.put, []
    def put(self, name, **arrays):
        if len(written) == stop_at: raise KeyboardInterrupt
        real(self, name, **arrays)
        written.append(name)
    monkeypatch.setattr(parts.Store, "put", put)
    with pytest.raises(KeyboardInterrupt): denoise(x, samples, out=tmp_path, measure=False, workers=1)
    monkeypatch.setattr(
        parts.Store, "put", lambda self, name, **arrays: (written.append(name), real(self, name, **arrays)))
    assert np.array_equal(denoise(x, samples, out=tmp_path, measure=False).labels, want.labels)
    assert len(written) == len(set(written)), "a finished piece was computed again"


@pytest.mark.slow("eleven thousand tracklets")
def test_another_request_does_not_take_over_the_work(world, tmp_path, monkeypatch):
    _, x, samples, want = world
    monkeypatch.setattr(module, "merge_parts", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): denoise(x, samples, sigma_cst=.7, out=tmp_path, measure=False)
    monkeypatch.undo()
    monkeypatch.setenv("CION_NB_PROGRESS", "0")
    with pytest.raises(ValueError, match="another request"):
        denoise_shard(x, samples, tmp_path, "videos", 0, 2, measure=False)
    assert np.array_equal(denoise(x, samples, out=tmp_path, measure=False).labels, want.labels)


@pytest.mark.slow("starts processes")
# the long way; shards of a band are asserted on the page of `denoise`
@pytest.mark.parametrize("half_width", [None])
def test_slurm_array_gives_the_labels_of_one_process(world, tmp_path, half_width):
    "slurm/denoise.sh with a scheduler that runs the jobs here, one after the other."
    folder, x, samples, want = world
    if half_width is None: want = denoise(x, samples, half_width=None, measure=False)
    scheduler = tmp_path / "sbatch"
    scheduler.write_text("""#!/bin/bash
set -e
array=0; export_=""
while [[ $1 == --* ]]; do
    case $1 in
        --array=*) array=${1#*-0-}; array=$(seq 0 ${1##*-});;
        --export=*) export_=${1#--export=ALL,};;
    esac
    shift
done
for i in $array; do env ${export_//,/ } SLURM_ARRAY_TASK_ID=$i bash "$@" >> "$LOG"; done
echo 17
""")
    scheduler.chmod(0o755)
    setting = ["measure=false"] + (["half_width=null"] if half_width is None else [])
    p = subprocess.run(["bash", str(ROOT / "slurm" / "denoise.sh"), str(folder / "features.npy"),
                        str(folder / "samples.parquet"), str(tmp_path / "out"), *setting],
                       env=ENV | dict(SBATCH=str(scheduler), SHARDS="3", PYTHON=forked.executable(),
                                      LOG=str(tmp_path / "log")), capture_output=True, text=True)
    assert p.returncode == 0 and "merge 17" in p.stdout, p.stderr
    log = (tmp_path / "log").read_text()
    assert log.count("--step videos") == 3 and log.count("--step links") == 3 and "pieces" in log
    got = Denoised.load(tmp_path / "out")
    assert np.array_equal(got.labels, want.labels)
    pd.testing.assert_frame_equal(got.links, want.links, check_exact=True)


@pytest.mark.slow("eleven thousand tracklets")
def test_shards_refuse_what_is_not_ready(world, tmp_path):
    _, x, samples, _ = world
    denoise_shard(x, samples, tmp_path, "videos", 0, 3, measure=False)
    with pytest.raises(ValueError, match="parts of step videos are missing"):
        denoise_shard(x, samples, tmp_path, "links", 0, 3, measure=False)
    with pytest.raises(ValueError, match="shard"): denoise_shard(x, samples, tmp_path, "videos", 3, 3)
    with pytest.raises(ValueError, match="unknown step"): denoise_shard(x, samples, tmp_path, "merge", 0, 3)


@pytest.mark.slow("starts processes")
def test_command_line_says_what_is_wrong(world, tmp_path, capsys):
    folder = world[0]
    for more, message in ((["sigma=1"], "sigma"),):
        p = forked.run(command(folder, tmp_path / "x", *more), env=ENV)
        assert p.returncode == 2 and message in p.stderr and "Traceback" not in p.stderr
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.parquet").touch()
    np.savez(tmp_path / "two.npz", a=np.zeros(3))
    for features, samples, more, message in ((folder / "features.npy", tmp_path / "empty.parquet", [],
                                              "empty.parquet is not a parquet"),
                                             (tmp_path / "text.npy", folder / "samples.parquet", [],
                                              "text.npy is not one whole"),
                                             (tmp_path / "two.npz", folder / "samples.parquet", [],
                                              "two.npz is not one whole"),
                                             (folder / "features.npy", folder / "samples.parquet", ["--shard", "0/2"],
                                              "go together"),
                                             (folder / "features.npy", folder / "samples.parquet",
                                              ["--device", "cudaa"], "unknown device"),
                                             (folder / "features.npy", folder / "samples.parquet",
                                              ["--set", "sigma_drm=abc"], "sigma_drm must be")):
        assert main(["denoise", str(features), str(samples), "--out", str(tmp_path / "x"), *more]) == 2
        assert message in capsys.readouterr().err
    p = forked.run(["-m", "cion_nb", "denoise", folder / "nothing.npy", folder / "samples.parquet", "--out",
                    tmp_path / "x"], env=ENV)
    assert p.returncode == 2 and "nothing.npy" in p.stderr and "Traceback" not in p.stderr


@pytest.mark.slow("eleven thousand tracklets")
@pytest.mark.parametrize("kw", [dict(), dict(half_width=None), dict(link="reciprocal"), dict(cannot_link="frames"),
                                dict(link="reciprocal", cannot_link="frames", half_width=50), dict(centre="video"),
                                dict(link="reciprocal", centre="video")])
def test_in_memory_and_in_a_folder_agree(world, tmp_path, monkeypatch, kw):
    _, x, samples, _ = world
    a, b = denoise(x, samples, measure=False, **kw), denoise(x, samples, measure=False, out=tmp_path, workers=1, **kw)
    for name in ("provenance", "tracklets", "links"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), check_exact=True)
    assert a.parameters["rules"] == b.parameters["rules"]


@pytest.mark.slow("eleven thousand tracklets")
def test_a_damaged_result_is_named(tmp_path):
    x, samples = feature_world(20, dim=8)
    denoise(x, samples, out=tmp_path / "out")
    (tmp_path / "out" / "links.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="links.parquet cannot be read.*run denoise again"):
        denoise(x, samples, out=tmp_path / "out")

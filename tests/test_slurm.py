"""The job scripts on a real SLURM of two simulated nodes. A pre-training is submitted, asked to stop, requeued,
resumed, and ends with the bits of an uninterrupted run; denoising is three jobs; features are one.

Needs root. Where SLURM is not installed, CION_NB_TEST_SLURM=1 (or CI=true) allows `apt-get install` of it.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image
from places import ROOT

import cion_nb as cion
from cion_nb.core.runs import Run
from cion_nb.core.settings import recipe

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def install():
    "SLURM, or a skip that says why not."
    if sys.platform != "linux" or os.geteuid(): pytest.skip("starting a SLURM of one's own needs Linux and root")
    if all(shutil.which(d, path=PATH) for d in DAEMONS): return
    if "1" != os.environ.get("CION_NB_TEST_SLURM") and "true" != os.environ.get("CI"):
        pytest.skip("SLURM is not installed; CION_NB_TEST_SLURM=1 lets this test install it with apt-get")
    if not shutil.which("apt-get"): pytest.skip("SLURM is not installed, and neither is apt-get")
    for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "slurm-client", "munge"]):
        p = subprocess.run(["apt-get", "-q", *command], env=os.environ | dict(DEBIAN_FRONTEND="noninteractive"),
                           capture_output=True, text=True, timeout=240)
        if p.returncode:
            pytest.skip(f"apt-get {command[0]} failed: {(p.stderr.strip().splitlines() or ['no message'])[-1]}")


def free_ports(n):
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in held: s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in held]


CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={s}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={s}/ctld
SlurmdSpoolDir={s}/%n
SlurmctldPidFile={s}/ctld.pid
SlurmdPidFile={s}/%n.pid
SlurmctldLogFile={s}/slurmctld.log
SlurmdLogFile={s}/%n.log
SlurmctldPort={ports[0]}
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
KillWait=5
GresTypes=gpu
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=64 RealMemory=8000 Gres=gpu:8
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=64 RealMemory=8000 Gres=gpu:8
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=2-0 State=UP
"""
# they stand for GPUs in what is asked for; nothing computes on them
GRES = "AutoDetect=off\nNodeName=n[1-2] Name=gpu Count=8 File=/dev/tty[0-7]\n"


class Cluster:
    "Daemons with their own folder, keys and ports; commands see no other SLURM."
    def __init__(self, folder):
        self.folder, self.running = folder, []
        for name in ("ctld", "n1", "n2"): (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "slurm.conf").write_text(CONF.format(s=folder, host=socket.gethostname().split(".")[0],
                                                       ports=free_ports(3)))
        (folder / "gres.conf").write_text(GRES)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))} | dict(
            SLURM_CONF=str(folder / "slurm.conf"), PATH=PATH)

    def start(self):
        f = self.folder
        self.daemon("munged", "--foreground", "--force", f"--key-file={f}/munge.key", f"--socket={f}/munge.socket",
                    f"--pid-file={f}/munge.pid", f"--log-file={f}/munge.log", f"--seed-file={f}/munge.seed")
        self.until(lambda: (f / "munge.socket").exists(), 20, "munged did not start")
        self.daemon("slurmctld", "-D")
        for n in ("n1", "n2"): self.daemon("slurmd", "-D", "-N", n)
        self.until(lambda: self.call("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle"] * 2, 60,
                   "the nodes did not come up")

    def daemon(self, *command):
        with open(self.folder / "daemons.out", "a") as out:
            self.running.append(subprocess.Popen(command, env=self.env, stdout=out, stderr=out,
                                                 stdin=subprocess.DEVNULL, start_new_session=True))

    def call(self, *command, check=True, **env):
        p = subprocess.run(command, env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        if check: assert p.returncode == 0, f"{command}: {p.stdout}{p.stderr}"
        return p.stdout

    def until(self, said, seconds, why):
        deadline = time.time() + seconds
        while not said():
            if time.time() > deadline:
                pytest.fail(f"{why} in {seconds} s\n"
                            + "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}"
                                        for p in [*self.folder.glob("*.log"), *self.folder.glob("*.out")]))
            time.sleep(.1)

    def state(self, job):
        return dict(w.split("=", 1) for w in self.call("scontrol", "-o", "show", "job", job).split() if "=" in w)

    def stop(self):
        if self.running:
            subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=self.env, capture_output=True,
                           timeout=30)
            subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, timeout=30)
            deadline = time.time() + 10
            while time.time() < deadline and self.call("squeue", "-h", check=False).strip(): time.sleep(.2)
        for p in reversed(self.running): p.terminate()
        for p in self.running:
            try: p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()


@pytest.fixture(scope="module")
def cluster():
    install()
    # a socket's path is at most 108 characters
    with tempfile.TemporaryDirectory(prefix="cion-slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        it = Cluster(Path(folder))
        try:
            it.start()
            yield it
        finally: it.stop()


CHANGES = dict(method="tracklet", epochs=5, images_per_epoch=96, batch_size=24, n_local=1, n_id=[2, 4],
               n_id_epochs=[0, 3], checkpoint_minutes=0.0, precision="fp32", out_dim=32)


@pytest.mark.slow("starts processes")
def test_a_job_of_two_nodes_is_stopped_requeued_and_ends_as_if_it_was_not(cluster, tmp_path):
    r, out, runs = recipe("pretrain", "smoke", **CHANGES), cluster.folder / "job.out", tmp_path / "runs"
    env = dict(CION_NB_RUNS=str(runs), PYTHON=sys.executable, PYTHONPATH=str(ROOT), DEVICE="cpu",
               SETTINGS=str(tmp_path / "none.sh"), OMP_NUM_THREADS="1",
               SBATCH=f"sbatch --parsable --nodes=2 --cpus-per-task=1 --output={out}")
    values = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in CHANGES.items()]
    job = cluster.call("bash", "slurm/pretrain.sh", "profile=smoke", *values, **env).strip()
    run = Run(r, runs / Run(r).name)
    cluster.until(lambda: list((run.folder / "checkpoints").glob("seen-*"))
                  or cluster.state(job)["JobState"] in ("FAILED", "COMPLETED"), 240, "no checkpoint")
    cluster.call("scancel", "--batch", "--signal=USR1", job)                          # what `--signal=B:USR1@120` sends
    cluster.until(lambda: cluster.state(job)["Restarts"] == "1", 60, "the job was not requeued")
    assert not run.is_done and "back into the queue" in out.read_text()
    cluster.until(lambda: cluster.state(job)["JobState"] == "PENDING", 60, "the job did not go back into the queue")
    # SLURM itself waits two minutes; a start within the same second meets the old start's revoked credential
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+4")
    cluster.until(lambda: "start 2:" in out.read_text(), 60, "the job did not start again")
    cluster.until(lambda: cluster.state(job)["JobState"] not in ("RUNNING", "COMPLETING"), 240, "the job did not end")
    assert cluster.state(job)["JobState"] == "COMPLETED", out.read_text()[-3000:]
    assert "2 process(es) on n[1-2]" in out.read_text()
    # two worlds of one process each would end well, too
    assert (run.result["processes"], run.result["resumed"], run.result["threads"]) == (2, 1, 1)
    through = tmp_path / "through"
    through.mkdir()
    for world in runs.glob("world-*"): (through / world.name).symlink_to(world)
    p = forked.run_ranks(2, ["-m", "cion_nb", "pretrain", "--recipe", str(run.folder / "recipe.json")],
                         os.environ | dict(CION_NB_RUNS=str(through), PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true",
                                           OMP_NUM_THREADS="1", CION_NB_PROGRESS="0"), 200)
    assert p.returncode == 0, p.stderr[-3000:]
    assert (run.folder / "backbone.safetensors").read_bytes() == (
        through / run.name / "backbone.safetensors").read_bytes()


def ended(cluster, jobs, out):
    "Waits for jobs; each must have completed."
    def state(job): return cluster.state(job)["JobState"]

    cluster.until(lambda: all(state(j) not in ("PENDING", "RUNNING", "COMPLETING") for j in jobs), 240,
                  "jobs did not end")
    assert all(state(j) == "COMPLETED" for j in jobs), "".join(f.read_text()[-2000:] for f in out.glob("*.out"))


@pytest.mark.slow("starts processes")
def test_denoising_is_three_jobs_and_gives_the_labels_of_one_process(cluster, tmp_path):
    features, samples = cion.feature_world(900, dim=16, images=6)
    np.save(tmp_path / "features.npy", features)
    cion.write_samples(samples, tmp_path / "samples.parquet")
    env = dict(PYTHON=forked.executable(), PYTHONPATH=str(ROOT), SETTINGS=str(tmp_path / "none.sh"),
               OMP_NUM_THREADS="1", SHARDS="2",
               SBATCH=f"sbatch --mem=1G --cpus-per-task=1 --output={tmp_path}/%x-%A_%a.out")
    said = cluster.call("bash", "slurm/denoise.sh", str(tmp_path / "features.npy"), str(tmp_path / "samples.parquet"),
                        str(tmp_path / "found"), "half_width=100", "measure=false", **env)
    jobs = re.findall(r"(?:videos|links|merge) (\d+)", said)
    assert len(jobs) == 3
    ended(cluster, jobs[-1:], tmp_path)
    alone = cion.denoise(features, samples, half_width=100, measure=False)
    assert np.array_equal(cion.Denoised.load(tmp_path / "found").labels, alone.labels)


@pytest.mark.slow("starts processes")
def test_features_by_one_job(cluster, tmp_path):
    world, rng = tmp_path / "world", np.random.default_rng(0)
    world.mkdir()
    names = [f"{i}.png" for i in range(20)]
    for name in names: Image.fromarray(rng.integers(0, 256, (64, 32, 3), np.uint8)).save(world / name)
    samples = cion.make_samples(names, pid=range(20))
    cion.write_samples(samples, world / "reid.parquet")
    model = cion.create_backbone("resnet10_tiny", (64, 32)).eval()
    file = cion.save_backbone(model, tmp_path / "backbone.safetensors")
    env = dict(PYTHON=forked.executable(), PYTHONPATH=str(ROOT), SETTINGS=str(tmp_path / "none.sh"),
               OMP_NUM_THREADS="1", DEVICE="cpu",
               SBATCH=f"sbatch --parsable --mem=2G --cpus-per-task=1 --output={tmp_path}/extract.out")
    job = cluster.call("bash", "slurm/extract.sh", str(world / "reid.parquet"), "--model", str(file), "--out",
                       str(tmp_path / "features"), "--set", "batch_size=16", **env).strip()
    ended(cluster, [job], tmp_path)
    found, own = cion.read_features(tmp_path / "features"), cion.extract(samples, world, model, tmp_path / "own")
    assert found.samples.equals(own.samples) and np.abs(found.x.astype(float) - own.x).max() < 2e-3


@pytest.mark.slow("starts processes")
def test_slurm_accepts_what_the_script_asks_for(cluster):
    for more in ((), ("--nodes=2",)):
        p = subprocess.run(["sbatch", "--test-only", *more, "slurm/pretrain.sh", "data_root=/data"], env=cluster.env,
                           cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert p.returncode == 0 and "to start at" in p.stderr, p.stderr
    over = subprocess.run(["sbatch", "--test-only", "--nodes=3", "slurm/pretrain.sh"], env=cluster.env, cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert over.returncode != 0, "a request that cannot be met is noticed here, so the two above were really looked at"


def submit(*args, **env):
    "The script before a job: prints what it would submit."
    env = ({k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
           | dict(SBATCH="echo submitted", PYTHON=forked.executable(), PYTHONPATH=str(ROOT), SETTINGS="/dev/null/none")
           | env)
    return subprocess.run(["bash", "slurm/pretrain.sh", *args], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=120)


@pytest.mark.parametrize("args,env,word", [(["sead=3"], {}, "did you mean 'seed'"), (["sead"], {}, "usage: sbatch"),
                                           (["profile=huge"], {}, "huge"),
                                           ([], dict(DEVICE="tpu"), "DEVICE=tpu: gpu or cpu")])
def test_wrong_settings_never_reach_the_queue(args, env, word):
    p = submit(*args, **env)
    assert p.returncode == 2 and word in p.stderr and "submitted" not in p.stdout


@pytest.mark.slow("starts processes")
def test_the_settings_file_reaches_sbatch(tmp_path):
    file = tmp_path / "settings.sh"
    (tmp_path / "CION").mkdir()
    (tmp_path / "CION" / "list.json").write_text("[]")
    file.write_text(f'export SBATCH_PARTITION=special\n: "${{DATA_ROOT:={tmp_path}/CION}}"\n: "${{DEVICE:=cpu}}"\n')
    listed = f"annotation={tmp_path}/CION/list.json"
    p = submit("seed=1", listed, SETTINGS=str(file), SBATCH=f"{sys.executable} {_printer(tmp_path)}")
    assert p.returncode == 0, p.stderr
    assert json.loads(p.stdout) == dict(SBATCH_PARTITION="special", SBATCH_GRES="none", DEVICE="cpu",
                                        argv=["slurm/pretrain.sh", "seed=1", listed])


def _printer(folder):
    file = folder / "sbatch.py"
    file.write_text(
        "import json, os, sys; print(json.dumps({k: os.environ.get(k) for k in ('SBATCH_PARTITION', 'SBATCH_GRES', "
        "'DEVICE')} | dict(argv=sys.argv[1:])))")
    return file

"""pretrain, finetune and reproduce on a made-up data set of coloured people, small enough for a test."""
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from cion_nb.backbones import create_backbone, load_backbone
from cion_nb.evaluate import evaluate
from cion_nb.features import Features, embed, read_data
from cion_nb.finetune import FineTuning, finetune
from cion_nb.pretrain import Distillation, identity_labels, pretrain
from cion_nb.reproduce import STAGES, make_run, make_runs, plan
from cion_nb.runs import MissingRun, Run, recipe
from cion_nb.samples import make_samples, read_samples, write_samples

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(epochs=2, images_per_epoch=48, batch_size=24, n_id_epochs=[0, 1], n_id=[2, 4], n_local=1, out_dim=32, head_hidden=32, head_bottleneck=16, queue=48, precision="fp32", channels_last=False)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    "12 people of two colours each, 2 cameras, 4 images a camera; the parquet file of their table."
    root, rng, rows = tmp_path_factory.mktemp("people"), np.random.default_rng(0), []
    for pid in range(1, 13):
        top, bottom = rng.integers(0, 255, (2, 3))
        for cam in (1, 2):
            for k in range(4):
                x = np.empty((64, 32, 3)); x[:32], x[32:] = top, bottom
                x = np.clip(x * (1 if cam == 1 else .7) + rng.normal(0, 12, x.shape), 0, 255).astype(np.uint8)
                path = f"{pid}_{cam}_{k}.png"; Image.fromarray(x).save(root / path)
                split = "train" if pid <= 8 else "query" if k == 0 else "gallery"
                rows.append(dict(path=path, pid=pid, camid=cam, tracklet=10 * pid + cam, frame=k, split=split, video=f"v{cam}"))
    samples = make_samples(**{k: [r[k] for r in rows] for k in rows[0]}).assign(true_pid=[r["pid"] for r in rows])
    write_samples(samples, root / "samples.parquet")
    return root / "samples.parquet"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs")); monkeypatch.setenv("CION_NB_PROGRESS", "0")
    return tmp_path / "runs"


def asked(people, method="tracklet", **changes): return recipe("pretrain", "tiny", method=method, **dict(data=str(people), identities=dict(tracklet="tracklet", cion_true="true_pid").get(method, "image")) | SMALL | (dict(n_id=[1], n_id_epochs=[0]) if method in ("dino", "lup") else {}) | (dict(n_local=0) if method == "lup" else {}) | changes)


@pytest.mark.parametrize("method", ["lup", "dino", "tracklet", "cion_true"])
def test_every_method_gives_a_backbone(people, runs, method):
    run = pretrain(asked(people, method))
    model = load_backbone(run.folder / "backbone.safetensors")
    assert embed(model, [people.parent / "1_1_0.png"]).shape == (1, model.embed_dim)
    assert run.result["images"] == 96 and run.result["train_images"] == 96 and np.isfinite(run.result["loss"])
    fresh = create_backbone("resnet10_tiny_ibn", (64, 32))
    assert model.card["recipe"] == run.recipe and not torch.equal(dict(model.named_parameters())["conv1.weight"], dict(fresh.named_parameters())["conv1.weight"])
    stamp = (run.folder / "result.json").stat().st_mtime_ns
    assert (pretrain(run.recipe).folder / "result.json").stat().st_mtime_ns == stamp, "the same request was computed twice"


def test_released_variant_epoch_teacher_and_batch_centre_run(people, runs):
    assert np.isfinite(pretrain(asked(people, variant="released", teacher="epoch", centre="batch")).result["loss"])
    with pytest.raises(ValueError, match="variant"): pretrain(asked(people, variant="relased"))


def test_epoch_teacher_is_frozen_inside_an_epoch(people, runs):
    task = Distillation(asked(people, teacher="epoch", epochs=4, images_per_epoch=48))
    crossed = [bool(task._crosses_epoch(seen / 192)) for seen in range(24, 216, 24)]
    assert crossed == [False, True] * 4


def test_last_layer_is_frozen_in_the_first_epoch(people, runs):
    from cion_nb.engine import fit
    task = Distillation(asked(people, freeze_last_layer_epochs=2, weight_decay=[0., 0.]))
    torch.manual_seed(0); task.build(torch.device("cpu"))
    fit(task, Run(task.recipe))
    torch.manual_seed(task.recipe["seed"]); reference = Distillation(task.recipe); reference.build(torch.device("cpu"))
    assert torch.equal(task.modules["model"].head.last_layer.weight_v, reference.modules["model"].head.last_layer.weight_v)
    assert not torch.equal(task.modules["model"].head.mlp[0].weight, reference.modules["model"].head.mlp[0].weight)


def test_killed_pretraining_resumes_to_the_same_bits(people, runs, tmp_path):
    r = asked(people, epochs=5, checkpoint_minutes=0.)
    through = Run(r)
    other = tmp_path / "other"
    env = os.environ | dict(CION_NB_RUNS=str(other), OMP_NUM_THREADS="1")
    file = tmp_path / "recipe.json"; file.write_text(json.dumps(r))
    p = subprocess.Popen([sys.executable, "-m", "cion_nb.pretrain", "--recipe", str(file)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder, deadline = other / through.name, time.time() + 120
    while not list((folder / "checkpoints").glob("seen-*")) and p.poll() is None and time.time() < deadline: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert list((folder / "checkpoints").glob("seen-*")) and not (folder / "result.json").exists()
    done = subprocess.run([sys.executable, "-m", "cion_nb.pretrain", "--recipe", str(file)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    own = subprocess.run([sys.executable, "-m", "cion_nb.pretrain", "--recipe", str(file)], env=env | dict(CION_NB_RUNS=str(tmp_path / "third")), capture_output=True, text=True, timeout=240)
    assert own.returncode == 0, own.stderr[-2000:]
    assert (folder / "backbone.safetensors").read_bytes() == (tmp_path / "third" / through.name / "backbone.safetensors").read_bytes()


def test_two_processes(people, runs, tmp_path):
    file = tmp_path / "recipe.json"; file.write_text(json.dumps(asked(people)))
    env = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(random.randint(20000, 40000)), "-m", "cion_nb.pretrain", "--recipe", str(file)],
                       env=env, capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr[-3000:]
    assert Run(asked(people)).result["processes"] == 2


def test_a_broken_image_is_replaced_and_counted(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "broken")
    (root / "3_1_2.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="3_1_2.png"): run = pretrain(asked(root / "samples.parquet"))
    assert run.result["unreadable"] == 1


def test_identities_of_a_denoising_run_join_by_path(people, runs):
    from cion_nb.denoise import denoise
    samples = read_samples(people)
    kept = samples.drop(index=[0, 5]).reset_index(drop=True)            # extraction skipped two images
    x = np.random.default_rng(0).normal(size=(len(kept), 8)); x /= np.linalg.norm(x, axis=1, keepdims=True)
    run = Run(recipe("denoise", "tiny"))
    with run.computing() as todo:
        found = denoise(x, kept, sigma_cst=2, sigma_drm=0); found.save(run.folder); write_samples(kept, run.folder / "samples.parquet"); run.finish({})
    labels = identity_labels(samples, run.recipe)
    assert labels[0] == labels[5] == -1 and (np.delete(labels, [0, 5]) == found.labels).all()


def test_fine_tuning_starts_from_the_named_backbone(people, runs):
    pre = pretrain(asked(people, "dino"))
    r = recipe("finetune", "tiny", data=str(people), weights=pre.recipe, epochs=1, images_per_epoch=32, batch_size=16, lr=0., erasing=0., precision="fp32")
    run = finetune(r)
    a, b = (dict(load_backbone(f.folder / "backbone.safetensors").named_parameters()) for f in (pre, run))
    assert all(torch.equal(a[k], b[k]) for k in a), "with a learning rate of 0 the weights are the pre-trained ones"
    counted = [k for k in load_backbone(pre.folder / "backbone.safetensors").state_dict() if not k.endswith("num_batches_tracked")]
    assert run.result["matched"] == len(counted)


def test_fine_tuning_learns_and_its_score_is_evaluates(people, runs):
    run = finetune(recipe("finetune", "tiny", data=str(people), epochs=6, images_per_epoch=96, batch_size=32, warmup_epochs=1, pad=2, precision="fp32"))
    f = Features.open(run.folder / "test-features"); split = f.samples.split.to_numpy()
    q, g = split == "query", split == "gallery"
    score = evaluate(f.x[q], f.x[g], f.samples[q], f.samples[g])
    assert run.result["mAP"] == pytest.approx(score.mAP) and run.result["rank1"] == pytest.approx(float(score.cmc[0]))
    log = pd.DataFrame(run.read_log())
    assert log.loss.iloc[-1] < log.loss.iloc[0] or len(log) == 1
    assert load_backbone(run.folder / "backbone.safetensors").input.mean == (.5, .5, .5)


def test_one_person_is_an_error(people, runs, tmp_path):
    t = read_samples(people); t.loc[t.split == "train", "pid"] = 1
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "one"); write_samples(t, root / "samples.parquet")
    with pytest.raises(ValueError, match="two people"): finetune(recipe("finetune", "tiny", data=str(root / "samples.parquet")))


def test_a_changed_input_is_another_run(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "copy")
    first = Run(asked(root / "samples.parquet")).name
    time.sleep(.01); t = read_samples(root / "samples.parquet"); write_samples(t.iloc[:-1], root / "samples.parquet")
    assert Run(asked(root / "samples.parquet")).name != first


def test_make_run_computes_dependencies_first(runs, monkeypatch):
    order = []
    def fake(stage):
        def run_it(r):
            run = Run(r)
            for needed in (v for v in r.values() if isinstance(v, dict) and "stage" in v): Run(needed).require()
            with run.computing(): order.append((stage, r.get("method"))); run.finish({})
            return run
        return run_it
    for stage in STAGES: monkeypatch.setitem(STAGES, stage, fake(stage))
    asked = [recipe("finetune", "tiny", weights=recipe("pretrain", "tiny", method=m)) for m in ("dino", "cion")]
    listed = plan(asked)
    make_runs(asked)
    assert len(order) == len(listed) == len(set(listed.run))
    assert [s for s, _ in order] == listed.stage.tolist(), "runs are computed in the order of the plan"
    make_runs(asked); assert len(order) == len(listed), "nothing is computed twice"


def test_paper_profile_prints_commands_instead_of_running(runs, capsys):
    r = recipe("pretrain", "paper", data_root="/nowhere", annotation="/nowhere.json")
    done = make_runs([r])
    said = capsys.readouterr().out
    assert not done[0].is_done and "accelerate launch -m cion_nb.pretrain --recipe" in said and "was not named" not in said
    assert json.loads(Path(said.split("--recipe ")[1].strip()).read_text()) == r
    with pytest.raises(MissingRun): Run(r).require()
    make_runs([recipe("finetune", "paper", weights=recipe("pretrain", "paper"))])
    said = capsys.readouterr().out
    assert "was not named" in said and said.index("cion_nb.pretrain") < said.index("cion_nb.finetune"), "what is needed first is printed first"


def test_an_identity_without_a_readable_image_sits_out(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "gone")
    (root / "3_1_2.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="3_1_2.png"): run = pretrain(asked(root / "samples.parquet", "dino"))
    assert run.result["train_images"] == 95 and run.result["unreadable"] == 1


def test_identities_of_other_data_are_refused(people, runs):
    run = Run(recipe("denoise", "tiny"))
    from cion_nb.denoise import denoise
    other = read_samples(people).assign(path=lambda t: "elsewhere/" + t.path)
    x = np.random.default_rng(0).normal(size=(len(other), 8))
    with run.computing(): denoise(x, other, sigma_cst=2, sigma_drm=0).save(run.folder); write_samples(other, run.folder / "samples.parquet"); run.finish({})
    with pytest.raises(ValueError, match="other data"): identity_labels(read_samples(people), run.recipe)


@pytest.mark.parametrize("changes,word", [(dict(optimizer="adamm"), "has sgd"), (dict(epochs=0), "must be positive"), (dict(batch_size=0), "must be positive")])
def test_settings_that_cannot_work_are_refused(people, runs, changes, word):
    with pytest.raises(ValueError, match=word): finetune(recipe("finetune", "tiny", data=str(people), **changes))


@pytest.mark.parametrize("args,word", [(["-p", "sedes", "3"], "did you mean 'seeds'"), (["--only", "table9"], "table4"), (["--profile", "huge"], "invalid choice")])
def test_reproduce_refuses_before_running(args, word, tmp_path):
    p = subprocess.run([sys.executable, "-m", "cion_nb.reproduce", "--only", "table4", *args] if "--only" not in args else [sys.executable, "-m", "cion_nb.reproduce", *args],
                       cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert p.returncode == 2 and word in p.stderr


@pytest.mark.parametrize("name,value,word", [("profil", "tiny", "did you mean 'profile'"), ("seeds", "five", "of type int"), ("seeds", "0", "at least one"), ("profile", "huge", "smoke, tiny, small, paper")])
def test_a_mistyped_parameter_fails_the_notebook(name, value, word, tmp_path):
    out = tmp_path / "out.ipynb"
    p = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs/reproduce/table4.ipynb"), str(out), "-k", "python3", "--no-progress-bar", "-p", name, value],
                       capture_output=True, text=True, timeout=240, env=os.environ | dict(CION_NB_RUNS=str(tmp_path / "runs")))
    assert p.returncode != 0
    assert word in p.stderr + out.read_text()

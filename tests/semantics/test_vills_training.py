"""A run of VILLS: what it exports and who can use it, resume, alarms, identities, and what goes on from it."""
import json
import shutil

import numpy as np
import pytest
import torch
import vills_examples
from vills_examples import Alone, asked, only

from cion_nb.companion.score import load_model, score
from cion_nb.core.runs import Run
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.models.backbones import load_backbone
from cion_nb.models.features import embed, OnnxModel
from cion_nb.models.leaving import export_onnx
from cion_nb.semantics import local_semantics, vills as vills_room
from cion_nb.semantics.vills import load_vills, TERMS, UNWEIGHED, Vills, vills
from cion_nb.training.engine import fit, last_checkpoint
from cion_nb.training.finetune import make_backbone
from cion_nb.training.pretrain import equal_budget
from cion_nb.video.clips import extract_clips
from cion_nb.video.video_reid import load_clip_model, make_clip_model, video_reid, VideoFineTuning


@pytest.fixture(scope="module")
def data(tmp_path_factory): return vills_examples.make(tmp_path_factory.mktemp("strollers"))


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    "A finished run of all terms with frames that need padding, and its teacher."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CION_NB_RUNS", str(tmp_path_factory.mktemp("runs")))
        kept, save = [], vills_room.save_vills
        patch.setattr(vills_room, "save_vills", lambda net, *a, **k: (kept.append(net), save(net, *a, **k)))
        r = asked(data, frame_size=[32, 20])
        return r, vills(r), kept[0].eval()


@pytest.fixture
def runs(first, monkeypatch): monkeypatch.setenv("CION_NB_RUNS", str(first[1].folder.parent))


@pytest.fixture
def no_parts(monkeypatch):
    "Whoever asks for parts now fails."
    def asks(*args, **kwargs): raise AssertionError("asked for the parts of an image")
    for name in ("local_crops", "write_parts", "part_boxes", "to_masks", "to_labels"):
        monkeypatch.setattr(local_semantics, name, asks)
    for kind in (local_semantics.WorldParts, local_semantics.PoseParts, vills_examples.Bands):
        monkeypatch.setattr(kind, "parts", asks)
    for name in ("open", "of", "crops", "__getitem__"): monkeypatch.setattr(local_semantics.PartStore, name, asks)


def clips_of(n=4, T=3):
    return np.random.default_rng(0).integers(0, 256, (n, T, 64, 32, 3)).astype(np.uint8)


def test_what_a_run_leaves(first, runs):
    r, run, teacher = first
    result, card = run.result, json.loads((run.folder / "vills.json").read_text())
    assert result["images"] == 48 and result["train_tracklets"] == 16 and result["train_images"] == 80
    assert result["padded"] == [32, 24] == card["padded"] and UNWEIGHED in result["terms"] == result["terms"]
    assert all(f"lambda_{term}=" in result["terms"] for term in TERMS)
    told = json.loads((run.folder / "backbone.json").read_text())
    assert told["part_tokens"] == ["head", "upper", "lower"] and told["padded"] == [32, 24]
    assert set(run.read_log()[-1]) >= {f"loss_{term}" for term in TERMS} | {"kl_to_mean", "feature_rank", "alarms"}
    assert list(equal_budget([run]).index) == ["vills"]
    assert (run.folder / "resampler.safetensors").is_file()


def test_lse_is_absent_once_a_network_is_trained(first, runs, data, tmp_path, no_parts):
    "Loading, `embed`, `extract` by `score`, and clips: the teacher's features, and nobody is asked for masks."
    r, run, teacher = first
    clips = clips_of()
    images = list(clips[:, 0])
    plain = load_backbone(run.folder / "backbone.safetensors")
    net = load_model(run.folder)
    wanted = embed(vills_room.VillsNet(teacher.backbone), images)
    assert net.names == ["coarse", "semantic"] and np.array_equal(embed(net, images), wanted)
    assert np.allclose(embed(plain, images), 2 * wanted[:, :96], atol=1e-6)                 # one of four alike
    moving = load_vills(run.folder, clips=True)
    assert moving.input.shape == (3, 3, 32, 20)
    assert np.array_equal(embed(moving, [list(c) for c in clips]), embed(teacher, [list(c) for c in clips]))
    found = score(net, str(data), out=tmp_path / "features")
    assert 0 < found.mAP <= 1
    still = load_vills(run.folder, "temporal")                                             # stills among clips
    assert still.input.shape == (3, 32, 20) and embed(still, images).shape == (4, 96)


@pytest.mark.slow("exports to ONNX")
def test_the_onnx_files_have_the_teachers_features(first, runs, tmp_path, no_parts):
    pytest.importorskip("onnxscript")
    r, run, teacher = first
    clips = clips_of()
    for name, net, given, of in (("images", load_model(run.folder), list(clips[:, 0]),
                                  vills_room.VillsNet(teacher.backbone)),
                                 ("clips", load_vills(run.folder, clips=True), [list(c) for c in clips], teacher)):
        export_onnx(net, tmp_path / f"{name}.onnx")
        assert np.abs(embed(OnnxModel(tmp_path / f"{name}.onnx"), given) - embed(of, given)).max() < 1e-4


class Cut(Exception): pass


@pytest.mark.parametrize("changes", [{}, only("temp")], ids=["all terms", "clips alone"])
def test_a_resumed_run_ends_in_the_same_bits(data, tmp_path, monkeypatch, changes):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path))
    r, ends = asked(data, checkpoint_minutes=0, **changes), []
    for name in ("through", "cut"):
        task, run, before = Vills(r), Run(r, tmp_path / name), Vills.loss
        if name == "cut":
            def cuts(self, *args, run=run, before=before):
                if last_checkpoint(run) and last_checkpoint(run).name.endswith("000024"): raise Cut
                return before(self, *args)
            with monkeypatch.context() as patch:
                patch.setattr(Vills, "loss", cuts)
                with pytest.raises(Cut): fit(task, run)
            task = Vills(r)
        assert fit(task, run)["resumed"] == (name == "cut")
        ends.append({key: value for part in task.modules.values() for key, value in part.state_dict().items()})
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_batches_do_not_depend_on_where_a_run_was_resumed(data):
    "Two streams: clips beside images, and clips alone; passes over clips go on while one over images lasts."
    for r in (asked(data, clip_batch=8), asked(data, **only("adapt"))):
        task, n = Vills(r), 8 * (r["lambda_coarse"] > 0)
        def taken(start, n_pass=0):
            return [rows for rows, _ in zip(task.sampler(1, n_pass, start, 0, 1), range(9))]
        whole = taken(0)
        assert len(whole) == 9 and all(np.array_equal(a, b) for a, b in zip(whole[3:], taken(3)))
        clips = [rows[n:] for rows in whole]
        assert all(len(np.unique(rows)) == r["clip_batch"] for rows in clips)
        for i in (0, 2): assert len(np.unique(np.concatenate(clips[2 * i:2 * i + 2]))) == 2 * r["clip_batch"]
        assert not np.array_equal(clips[0], clips[2]) and not np.array_equal(clips[0], taken(0, 1)[0][n:])
        halves = [[rows for rows, _ in zip(task.sampler(1, 0, 0, k, 2), range(3))] for k in (0, 1)]
        for both, mine, other in zip(whole, *halves):
            split = n // 2
            assert np.array_equal(both, np.concatenate([mine[:split], other[:split], mine[split:], other[split:]]))


def test_two_draws_of_a_tracklet_differ_and_keep_their_frames_together(data):
    task = Vills(asked(data, view_changes=dict(grey=0., jitter=0., blur=[0., 0., 0.], solarise=[0., 0., 0.], flip=.5)))
    rows = next(iter(task.sampler(1, 0, 0, 0, 1)))
    a, again, later = task.load(rows, 8), task.load(rows, 8), task.load(rows, 16)
    assert a["clips"].shape == (2, 4, 3, 3, 32, 24) and a["stills"].shape == (4, 3, 32, 24)
    assert a["crops"].shape == (3, 8, 3, 32, 16) and a["presence"].shape == (3, 8)
    assert all(torch.equal(a[name], again[name]) for name in ("clips", "stills", "crops"))
    assert not torch.equal(a["clips"], later["clips"]) and not torch.equal(a["clips"][0], a["clips"][1])
    shown = a["clips"].float()
    within = (shown[:, :, 1:] - shown[:, :, :-1]).abs().mean()                 # one crop and one mirroring a clip
    between = (shown[0] - shown[1]).abs().mean()
    assert float(within) < .7 * float(between)


def test_a_short_tracklet_repeats_its_frames(data):
    task = Vills(asked(data, frames=7, **only("temp")))
    rows = task.clips.rows(np.arange(4), 3)
    assert rows.shape == (4, 7) and all(len(np.unique(own)) <= 5 for own in rows) and (np.diff(rows) >= 0).all()


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("terms", [TERMS, ("temp", "adapt")])
def test_a_collapse_rings_with_the_centre_off(data, tmp_path, monkeypatch, terms):
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path))
    r = asked(data, epochs=10, images_per_epoch=12, batch_size=4, centre_momentum=1., ema=[0., 0.], lr=.1, lr_per=8,
              head_bn=False, **only(*terms))
    with pytest.warns(RuntimeWarning) as said: run = vills(r)
    assert any("alarm 'constant'" in str(w.message) for w in said)
    assert "constant" in run.result["alarms"]


def test_identities_pair_clips_of_one_person_across_videos(data):
    "Clips of a person stand next to each other and teach each other; images take CION's loss."
    r = asked(data, method="vills_cion", identities="pid", n_id=[2], n_id_epochs=[0])
    task = Vills(r)
    rows = next(iter(task.sampler(2, 0, 0, 0, 1)))
    pid, camid = (task.samples[name].to_numpy()[rows] for name in ("pid", "camid"))
    assert (pid[8::2] == pid[9::2]).all() and (camid[8::2] != camid[9::2]).all() and (pid[:8:2] == pid[1:8:2]).all()
    batch = task.load(rows, 8)
    assert batch["clip_identity"].tolist() == [0, 0, 1, 1] and batch["identity"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.manual_seed(0)
    task.build("cpu")
    value, _ = task.loss(task.modules["model"], batch, Alone)
    assert torch.isfinite(value)
    alone = Vills(asked(data, identities="tracklet", n_id=[2], n_id_epochs=[0], **only("temp")))
    assert sorted(alone.people) == list(range(16))


@pytest.mark.slow("trains networks")
def test_a_backbone_starts_vills_and_vills_starts_everything(first, runs, data):
    r, run, teacher = first
    again = Vills(asked(data, weights=str(run.folder), **only("coarse", "lse")))
    again.build("cpu")
    own = again.modules["model"].backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in teacher.backbone.state_dict().items())
    backbone, report = make_backbone(recipe("finetune", "tiny", backbone="vit_trial", image_size=[64, 32],
                                            weights=str(run.folder), data=str(data)))
    assert report.added == ["reg_token"] and torch.equal(backbone.reg_token, teacher.backbone.reg_token)


CLIPS = dict(epochs=1, images_per_epoch=16, batch_size=8, k=2, frames=3, drops=[1.], warmup_epochs=0, precision="fp32",
             channels_last=False, backbone="vit_trial", image_size=[32, 24], method="vills")


@pytest.mark.slow("trains networks")
def test_clips_are_fine_tuned_from_a_run(first, runs, data, tmp_path):
    r, run, teacher = first
    for weights in (r, str(run.folder)):
        asked_for = recipe("video_reid", "tiny", data=str(data), weights=weights, **CLIPS)
        model, report = make_clip_model(asked_for, 4)
        start = model.backbone
        assert start.names == ["coarse", "semantic", "temporal"] and start.embed_dim == 5 * 96
        own = start.resampler.state_dict()
        assert all(torch.equal(own[name], value) for name, value in teacher.resampler.state_dict().items())
        assert torch.equal(start.backbone.reg_token, teacher.backbone.reg_token)
        assert all(p.requires_grad for p in start.parameters())
    task = VideoFineTuning(asked_for)
    task.build("cpu")
    value, told = task.loss(task.modules["model"], task.load(next(iter(task.sampler(0, 0, 0, 0, 1))), 0), Alone)
    assert value.item() == pytest.approx(float(told["cross_entropy"] + told["triplet"]))
    value.backward()
    assert all(p.grad is not None for p in task.modules["model"].parameters() if p.requires_grad)
    done = video_reid(asked_for)
    assert 0 < done.result["mAP"] <= 1
    model = load_clip_model(done.folder)
    features = extract_clips(read_samples(data).query("split != 'train'"), data.parent, model, tmp_path / "again")
    kept = np.load(done.folder / "test-features" / "features.npy")
    assert np.allclose(features.x, kept, atol=2e-3) and features.x.shape == (8, 480)


# ---- bad input

def test_images_without_tracklets(data, tmp_path):
    "temp and adapt are refused by name; without them images alone are learned from."
    root = tmp_path / "images"
    shutil.copytree(data.parent, root)
    write_samples(read_samples(data).assign(tracklet=-1), root / "samples.parquet")
    with pytest.raises(ValueError, match="no image is in a tracklet, so lambda_temp and lambda_adapt"):
        Vills(asked(root / "samples.parquet"))
    assert Vills(asked(root / "samples.parquet", **only("coarse", "lse"))).clips is None


def test_masks_of_other_images(data, tmp_path):
    root = tmp_path / "other"
    shutil.copytree(data.parent, root)
    table = read_samples(root / "samples.parquet")
    (root / table.path[0]).write_bytes((root / table.path[11]).read_bytes())
    with pytest.raises(ValueError, match="has changed since"): Vills(asked(root / "samples.parquet"))
    shutil.copy(root / table.path[11], root / "new.png")
    table.loc[0, "path"] = "new.png"
    write_samples(table, root / "samples.parquet")
    with pytest.raises(ValueError, match="has no masks of 1 image, the first: new.png"):
        Vills(asked(root / "samples.parquet"))
    local_semantics.write_parts(read_samples(data), data.parent, vills_examples.Bands(), tmp_path / "small", (32, 16))
    task = Vills(asked(data, parts=str(tmp_path / "small")))
    with pytest.raises(ValueError, match="they need its size"): task.load(np.arange(8), 8)


def test_an_image_that_cannot_be_read_has_no_part(data, tmp_path):
    "Another stands in for it, whose parts are elsewhere; a clip is made of the frames that are left."
    root = tmp_path / "broken"
    shutil.copytree(data.parent, root)
    table = read_samples(root / "samples.parquet")
    (root / table.path[0]).write_bytes(b"no picture")
    masks = local_semantics.write_parts(table, root, vills_examples.Bands(), tmp_path / "parts")
    assert len(masks.unreadable) == 1
    with pytest.warns(UserWarning, match="replaced by another image"):
        task = Vills(asked(root / "samples.parquet", parts=str(tmp_path / "parts")))
    batch = task.load(np.r_[0:8, task.offset + task.clips.table.first_row[:4]], 8)
    assert batch["presence"][:, 0].eq(0).all() and batch["presence"][0, 1] == 1
    assert list(task.images.reasons) == [0] and task.n_images == 79 and task.clips.table.n_frames[0] == 4


REFUSED = [
    (dict(parts=None), "name a folder of write_parts in parts"),
    (dict(backbone="resnet10_tiny_ibn"), "is no ViT and has no tokens.*lambda_lse=0"),
    (only(), "every lambda is 0"), (dict(clip_batch=17), "clip_batch=17, and there are 16 tracklets"),
    (dict(clip_batch=3, clip_n_id=2), "clip_batch 3 .* 3 clips .* not a multiple of clip_n_id=2"),
    (dict(frames=3, image_size=[64, 30]), "multiples of 8"),
    (dict(method="vils"), "did you mean 'vills'"), (dict(lambda_temp=-1.), "must not be negative"),
    (dict(weights="nowhere.safetensors"), "nowhere.safetensors")]


@pytest.mark.parametrize("changes, word", REFUSED, ids=lambda x: None if isinstance(x, dict) else x[:20])
def test_what_a_recipe_cannot_ask_for(data, changes, word):
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        r = asked(data, **changes)
        vills_room.check_vills(r)
        Vills(r).build("cpu")


def test_without_lse_any_network_will_do(data):
    "A convolutional network has no part tokens; the resampler reads the places of its map."
    task = Vills(asked(data, backbone="resnet10_tiny_ibn", **only("coarse", "temp", "adapt")))
    torch.manual_seed(0)
    task.build("cpu")
    batch = task.load(next(iter(task.sampler(1, 0, 0, 0, 1))), 8)
    value, _ = task.loss(task.modules["model"], batch, Alone)
    value.backward()
    assert torch.isfinite(value) and task.modules["model"].net.n_parts == 0
    assert all(p.grad is not None for p in task.modules["model"].parameters() if p.requires_grad)


@pytest.mark.parametrize("weights, word", [(None, "goes on from a run of vills"), ("imagenet", "from a run of vills"),
                                           (dict(stage="finetune"), "not one of finetune"),
                                           ("backbone.safetensors", "is none")])
def test_clips_need_a_run_of_vills(data, tmp_path, weights, word):
    asked_for = recipe("video_reid", "tiny", data=str(data), weights=weights, **CLIPS)
    with pytest.raises(ValueError, match=word): vills_room.clip_net(None, asked_for)


def test_a_folder_without_its_card(first, runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no vills.json"): load_vills(tmp_path)
    shutil.copytree(first[1].folder, tmp_path / "run")
    (tmp_path / "run" / "vills.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks parts, resampler"): load_vills(tmp_path / "run")
    made = json.loads((first[1].folder / "vills.json").read_text())
    made["resampler"]["latents"] = 5
    (tmp_path / "run" / "vills.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="latents"): load_vills(tmp_path / "run", clips=True)

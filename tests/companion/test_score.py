"""A model and a data set in, a score out: the run's own score again, other test sets, changed images, tracklets."""
import numpy as np
import pytest
from trainings import changed, quick

from cion_nb.companion.score import load_model, score
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.store import Features
from cion_nb.models.backbones import create_backbone, save_backbone
from cion_nb.models.features import embed
from cion_nb.models.leaving import export_onnx, export_torchscript
from cion_nb.training.finetune import finetune, load_finetuned


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("changes", [dict(method="mgn"), dict(method="transreid"),
                                     dict(method="transreid", sie=False, overlap=False, backbone="vit_trial"),
                                     dict(feature="after_neck")], ids=["MGN", "TransReID", "no SIE", "BNNeck"])
def test_every_method_leaves_as_one_file_that_scores_the_same(people, runs, tmp_path, changes):
    run = finetune(quick(people, **changes))
    model = load_finetuned(run.folder)
    report = export_onnx(model, tmp_path / "m.onnx")
    assert report.relative < 1e-3
    mine, theirs = score(load_model(run.folder), str(people)), score(load_model(tmp_path / "m.onnx"), str(people))
    assert theirs.mAP == pytest.approx(mine.mAP, abs=2e-3) and mine.mAP == pytest.approx(run.result["mAP"], abs=2e-3)
    # knows cameras 0, 1 and 2: what else comes in is named
    if changes == dict(method="transreid"):
        with pytest.raises(ValueError, match="knows camid 0 to 2, not 3"):
            embed(load_model(tmp_path / "m.onnx"), [people.parent / "1_1_0.png"], columns=dict(camid=[3]))
        with pytest.raises(ValueError, match="also takes camid"):
            embed(load_model(tmp_path / "m.onnx"), [people.parent / "1_1_0.png"])
        export_torchscript(model, tmp_path / "m.pt")


@pytest.mark.slow("trains networks")
def test_direct_transfer_names_another_test_set(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "target")
    t = read_samples(people)
    write_samples(t[t.pid.isin([9, 10]) | (t.split == "train")], root / "samples.parquet")
    run = finetune(quick(people, test_data=str(root / "samples.parquet"), flip_test=True, protocol="no_camera"))
    f = Features.open(run.folder / "test-features")
    assert set(f.samples.pid) == {9, 10} and run.result["train_ids"] == 8
    assert (run.result["flip_test"], run.result["protocol"]) == (True, "no_camera")


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_score_is_the_saved_models(people, runs, precision):
    "Trained in bf16, tested as anybody who loads it will."
    run = finetune(quick(people, precision=precision))
    stored = Features.open(run.folder / "test-features")
    # stored in half precision
    np.testing.assert_allclose(embed(load_finetuned(run.folder), [people.parent / p for p in stored.samples.path]),
                               stored.x, atol=3e-4)


@pytest.mark.slow("trains networks")
def test_a_test_image_that_cannot_be_read_is_counted(people, runs, tmp_path):
    def change(t, root):
        (root / "9_1_0.png").write_bytes(b"no image")
        return t
    run = finetune(quick(changed(people, tmp_path, change)))
    assert run.result["test_unreadable"] == 1
    found = score(load_model(run.folder), str(tmp_path / "changed/samples.parquet"))
    assert found.unreadable == ["9_1_0.png"] and "1 images could not be read" in str(found)


@pytest.mark.slow("trains networks")
def test_scoring_changed_images_extracts_them_again(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "copy")
    save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)), tmp_path / "b.safetensors")
    model = load_model(tmp_path / "b.safetensors")
    before = score(model, str(root / "samples.parquet"))
    again = score(model, str(root / "samples.parquet"))
    assert before.mAP == again.mAP and len(list(runs.glob("score-*"))) == 1
    from PIL import Image
    rng = np.random.default_rng(0)
    for p in root.glob("*.png"): Image.fromarray(rng.integers(0, 255, (64, 32, 3), dtype=np.uint8)).save(p)
    assert score(model, str(root / "samples.parquet")).mAP < before.mAP and len(list(runs.glob("score-*"))) == 2


@pytest.mark.slow("trains networks")
def test_whole_tracklets_are_scored(people, runs, tmp_path):
    t = read_samples(people)
    save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)), tmp_path / "b.safetensors")
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "copy")
    t["split"] = t.split.where(t.split == "train", np.where(t.camid == 1, "query", "gallery"))
    write_samples(t, root / "samples.parquet")
    one, whole = (score(load_model(tmp_path / "b.safetensors"), str(root / "samples.parquet"), tracklets=k)
                  for k in (False, True))
    assert (len(one.per_query), one.n_gallery) == (16, 16) and (len(whole.per_query), whole.n_gallery) == (4, 4)

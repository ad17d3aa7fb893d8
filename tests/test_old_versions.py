"""What version 0.1.0 wrote, before there were folders, is read by this one: a run, a backbone, a feature store, a
denoised folder."""

import json
import tarfile

import numpy as np
import pytest
from places import TESTS

import cion_nb as cion
from cion_nb.core.runs import run_hash
from cion_nb.models.features import embed

FIXTURES = TESTS / "fixtures"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURES / "v0_1_0.tar.xz") as archive: archive.extractall(folder, filter="data")
    return folder / "v0_1_0"


def cosines(x, y): return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


def test_a_feature_store(old):
    features = cion.read_features(old / "features")
    assert (np.array_equal(features.x, np.load(old / "expected_features.npy"))
            and features.samples.split.isin(["train", "query", "gallery"]).all())


def test_a_backbone_gives_the_features_it_gave(old):
    model, expected = (cion.load_backbone(old / "backbone.safetensors"),
                       np.load(old / "expected_features.npy").astype(np.float32))
    images = [old / "images" / path for path in cion.read_features(old / "features").samples.path]
    assert cosines(embed(model, images), expected).min() > 1 - 1e-5


def test_a_run(old, monkeypatch):
    name = json.loads((old / "expected.json").read_text())["run"]
    monkeypatch.setenv("CION_NB_RUNS", str(old))
    recipe = json.loads((old / name / "recipe.json").read_text())
    run = cion.Run(recipe)
    assert run.folder == old / name and run.is_done, "the same recipe has the same name, so nothing is computed twice"
    assert (run_hash(cion.recipe("finetune", "smoke")) == run.hash
            and run.result["mAP"] == json.loads((old / "expected.json").read_text())["mAP"])
    images = [old / "images" / path for path in cion.read_features(old / "features").samples.path]
    assert (cosines(embed(cion.load_model(old / name), images), np.load(old / "expected_tuned.npy").astype(np.float32))
            .min() > 1 - 1e-5)
    assert cion.list_runs().query("state == 'done'").run.tolist() == [name]


def test_a_denoised_folder(old):
    expected = json.loads((old / "expected.json").read_text())["labels"]
    found = cion.Denoised.load(old / "denoised")
    assert found.labels.tolist() == expected
    again = cion.denoise(np.load(old / "denoised_features.npy"), cion.read_samples(old / "denoised_samples.parquet"))
    assert again.labels.tolist() == expected and again.noise.equals(found.noise)

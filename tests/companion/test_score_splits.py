"""Ten splits: one model asked ten times by one extraction, a model a split, what is warned of, the command."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from examples import Mean, quiet, warned
from PIL import Image
from scipy.io import savemat

from cion_nb.companion.commands import main
from cion_nb.companion.score import score, score_splits
from cion_nb.models.backbones import create_backbone, save_backbone


@pytest.fixture(scope="module")
def ilids(tmp_path_factory):
    "Eight people under two cameras, three frames a sequence: a colour a person, noise a frame."
    root, rng = tmp_path_factory.mktemp("iLIDS-VID"), np.random.default_rng(0)
    colours = rng.integers(60, 200, (8, 3))
    for c, p, f in np.ndindex(2, 8, 3):
        file = root / f"sequences/cam{c + 1}/person{p + 1:03d}/cam{c + 1}_person{p + 1:03d}_{f + 1:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = colours[p] + 20 * c + rng.normal(0, 40, (16, 8, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    places = np.stack([rng.permutation(8) + 1 for _ in range(10)])
    savemat(root / "train_test_splits_ilidsvid.mat", dict(ls_set=places.astype(float)))
    return root


@pytest.mark.parametrize("how", [
    {}, dict(trapezoid=True, flip=True), dict(reranked=True, tracklets=False), dict(draws=2)])
def test_each_split_is_its_own_score_and_images_are_extracted_once(ilids, runs, how):
    model = Mean()
    found = quiet(score_splits, model, "ilids_vid", str(ilids), **how)
    assert len(list(runs.glob("score-*"))) == 1 and found.split.tolist() == list(range(10))
    for split in (0, 7):
        alone = quiet(score, model, f"ilids_vid_{split}", str(ilids), **how).asdict()
        assert found.loc[split, list(alone)].to_dict() == alone
    n = 12 if "tracklets" in how else 4
    assert set(found.n_query) == {n} and ("AP" in found) == ("trapezoid" in how)


def test_a_model_a_split(ilids, runs):
    models = [Mean(scale=1. + k) for k in range(3)]
    found = quiet(score_splits, models, "ilids_vid", str(ilids), splits=[1, 4, 9])
    assert found.split.tolist() == [1, 4, 9] and len(list(runs.glob("score-*"))) == 3
    assert found.mAP[1] == quiet(score, models[1], "ilids_vid_4", str(ilids)).mAP
    with pytest.raises(ValueError, match="2 models for 10 splits"): score_splits(models[:2], "ilids_vid", str(ilids))
    with pytest.raises(ValueError, match="'mars_0' is not known"): score_splits(models[0], "mars", str(ilids))
    with pytest.raises(ValueError, match="trapezoid and draws"):
        quiet(score_splits, models[0], "ilids_vid", str(ilids), draws=2, trapezoid=True)


def test_frames_that_cannot_be_read_are_in_no_mean_and_counted(ilids, runs, tmp_path):
    import shutil
    root = shutil.copytree(ilids, tmp_path / "copy")
    (root / "sequences/cam2/person003/cam2_person003_00002.png").write_bytes(b"no image")
    found = quiet(score_splits, Mean(), "ilids_vid", str(root))
    whole = quiet(score_splits, Mean(), "ilids_vid", str(ilids))
    tested = found.n_unreadable == 1
    assert 0 < tested.sum() < 10 and (found.n_query == 4).all()
    assert (found.mAP[~tested] == whole.mAP[~tested]).all()


def test_a_model_that_knows_the_people_is_warned_of(ilids, runs):
    model = Mean()
    model.card = dict(recipe=dict(data="ilids_vid_3"))
    words = "was trained on ilids_vid_3: among the test people of"
    assert [s for s in warned(score, model, "ilids_vid_5", str(ilids))[1] if f"{words} ilids_vid_5" in s]
    assert [s for s in warned(score_splits, model, "ilids_vid", str(ilids))[1] if words in s]
    assert not [s for s in warned(score, model, "ilids_vid_3", str(ilids))[1] if words in s]
    model.card = dict(recipe=dict(data="prid2011_3"))
    assert not [s for s in warned(score, model, "ilids_vid_3", str(ilids))[1] if "was trained" in s]


def test_the_command_tells_mean_and_spread(ilids, runs, tmp_path, capsys):
    save_backbone(create_backbone("resnet10_tiny", (64, 32)), tmp_path / "b.safetensors")
    asked = ["score", str(tmp_path / "b.safetensors"), "--data", "ilids_vid", "--data-root", str(ilids), "--splits"]
    assert main([*asked, "--trapezoid", "--json", str(tmp_path / "s.json")]) == 0
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.startswith("mAP (trapezoid) ") and said.count("±") == 4 and "(10 splits, market protocol)" in said
    rows = SimpleNamespace(**json.loads((tmp_path / "s.json").read_text())).splits
    assert [row["split"] for row in rows] == list(range(10)) and rows[0]["AP"] == "trapezoid"
    assert main(["score", *asked[1:-1]]) == 2 and "did you mean 'ilids_vid_" in capsys.readouterr().err

"""`cion_nb track` with detectors that embed, its tracker that goes by them, and the recipes of README."""
import json
import re
import shlex
import warnings
from functools import reduce

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from places import ROOT
from street import N, write_street

from cion_nb.companion.commands import main
from cion_nb.core.samples import read_samples
from cion_nb.core.settings import describe, recipe
from cion_nb.core.store import read_features
from cion_nb.data import tracking as T
from cion_nb.detection.pointid import PointDetector, PointID, save_pointid
from cion_nb.models.backbones import create_backbone, save_backbone
from cion_nb.models.features import extract


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A video with its boxes, a backbone, and a run of idfree that has not learned anything."
    root = tmp_path_factory.mktemp("here")
    truth = write_street(root / "street.avi", N)
    truth.assign(frame=truth["frame"] + 1, id=-1).to_csv(root / "det.txt", index=False, header=False)
    torch.manual_seed(0)
    save_backbone(create_backbone("resnet10_tiny_ibn", (64, 32)), root / "backbone.safetensors")
    save_pointid(PointID("resnet10_tiny_ibn", channels=8, dim=8, size=(64, 96)), root / "run")
    return root


TRACK = "track street.avi --out {out} --detector det.txt --set min_height=20"


def test_boxes_of_a_file_with_features_of_a_backbone(here, tmp_path, monkeypatch, capsys):
    "Joined by these, kept as a store that is what `extract` gives of the crops, and denoised from there."
    monkeypatch.chdir(here)
    line = f"{TRACK.format(out=tmp_path / 'o')} --embed backbone.safetensors --tracker embedding --features"
    assert main([*line.split(), "--check"]) == 0 and not (tmp_path / "o").exists()
    assert main(line.split()) == 0
    samples, store = read_samples(tmp_path / "o" / "samples.parquet"), read_features(tmp_path / "o" / "features")
    assert samples.equals(store.samples) and store.x.shape == (len(samples), 256) and samples.tracklet.nunique() == 4
    from cion_nb.models.backbones import load_backbone
    again = extract(samples, tmp_path / "o", load_backbone(here / "backbone.safetensors"), tmp_path / "again")
    assert (np.einsum("nd,nd->n", store.x.astype(float), again.x.astype(float)) > .98).all()     # JPEG is between
    settings = json.loads((tmp_path / "o" / "street" / "tracking.json").read_text())["settings"]
    assert settings["tracker"] == "embedding" and settings["detector"]["detector"] == "embedded"
    assert main(["denoise", str(tmp_path / "o" / "features"), "--out", str(tmp_path / "i"), "--check"]) == 0


def test_a_run_of_idfree_is_a_detector_that_embeds(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(here)
    for detector in ("run", "run/pointid.safetensors"):
        line = f"track street.avi --out {tmp_path / 'o'} --detector {detector} --tracker embedding --features --check"
        assert main(line.split()) == 0
    write_street(tmp_path / "short.avi", 8)
    (tmp_path / "large").mkdir()
    for i, picture in T.Video(tmp_path / "short.avi").frames():
        large = np.kron(picture(), np.ones((2, 2, 1), np.uint8))
        Image.fromarray(large[..., ::-1]).save(tmp_path / "large" / f"{i:03d}.png")
    detector = PointDetector(here / "run", min_score=0., k=3)
    for video, size in ((tmp_path / "short.avi", (320, 240)), (tmp_path / "large", (640, 480))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                                     # no frame rate
            boxes, held, x = T.detect(video, detector, tmp_path / "cache")
        assert held == 8 and x.shape == (len(boxes), 8) == (24, 8) and boxes["frame"].nunique() == 8
        assert (boxes[["right", "bottom"]].max() <= size).all() and (boxes["right"] > size[0] / 2).any()


@pytest.mark.parametrize("line, word", [
    ("--tracker embedding", 'tracker "embedding" goes by embeddings, and MotDetections gives none: wrap it'),
    ("--features", "features=True keeps the detector's embeddings, and MotDetections gives none"),
    ("--embed nowhere --tracker embedding", "nowhere"),
    ("--embed run --tracker embedding", "holds no model: none of"),
    ("--embed backbone.safetensors --tracker embeding", "tracker 'embeding' is not known"),
    ("--detector torchvision --tracker embedding", "'torchvision' gives none"),
    ("--detector hall", "pointid.json is missing: name the folder of a finished run of idfree"),
])
def test_what_is_refused_before_anything_is_detected(here, line, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(here)
    (here / "hall").mkdir(exist_ok=True)
    assert main(f"{TRACK.format(out=tmp_path / 'o')} {line}".split()) == 2
    said = capsys.readouterr().err
    assert word in said and "Traceback" not in said and not (tmp_path / "o").exists()


def test_help_tells_what_embeds(capsys):
    with pytest.raises(SystemExit): main(["track", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    words = ("a run of `idfree`, which embeds as well", "--embed MODEL", "or embedding, which joins boxes by their")
    assert all(one in said for one in (*words, "--features"))


# ---------------------------------------------------------------- recipes

MARKS = ("supplement", "assumed (FairMOT)", "assumed (ours)")


@pytest.mark.parametrize("stage", ["idfree", "find"])
def test_every_value_of_id_free_says_whose_it_is(stage):
    told = describe(stage).set_index("setting")
    assert told["source"].str.startswith(MARKS).all(), told["source"][~told["source"].str.startswith(MARKS)]
    if stage == "find":
        sizes = [recipe("find", "paper", frames=frames, **more)["image_size"] for frames, more in
                 (("test", {}), ("train", {}), ("test", dict(image_size=[608, 1088])))]
        assert sizes == [[900, 1500], None, [608, 1088]]
        return
    for name, value, mark in (("batch_size", "12", "assumed (FairMOT)"), ("backbone", "dla34", "assumed (FairMOT)"),
                              ("image_size", "[608, 1088]", "assumed (FairMOT)"), ("lr", "0.0001", "assumed (FairMOT)"),
                              ("epochs", "30", "assumed (FairMOT)"), ("drops", "[20.0]", "assumed (FairMOT)"),
                              ("balance", "0.4", "supplement"), ("temperature", "0.1", "assumed (ours)"),
                              ("data", "coco,crowdhuman", "supplement")):
        assert told.loc[name, "paper"] == value and told.loc[name, "source"].startswith(mark), name


def commands_of_readme(stage):
    "What follows `-m cion_nb STAGE`, or a stage's script, in README's commands."
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    begin = rf"(?:accelerate launch .* -m cion_nb {stage}|SHARDS=\d+ bash slurm/{stage}\.sh) (.*)"
    found = (re.fullmatch(begin, line.partition("  #")[0]) for line in text.splitlines())
    return [shlex.split(line[1]) for line in found if line]


def test_the_commands_of_readme_can_be_meant(here, tmp_path, monkeypatch, capsys):
    "Dry, over a COCO and a CrowdHuman of two frames each and a folder of videos: the second starts from the first."
    det = tmp_path / "det"
    for folder in ("coco/annotations", "coco/train2017", "crowdhuman/Images"): (det / folder).mkdir(parents=True)
    for path in ("coco/train2017/1.jpg", "coco/train2017/2.jpg", "crowdhuman/Images/a.jpg"):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(det / path)
    images = [dict(id=i, file_name=f"{i}.jpg", width=30, height=20) for i in (1, 2)]
    boxes = [dict(id=1, image_id=1, category_id=1, bbox=[1, 2, 5, 9], iscrowd=0)]
    (det / "coco/annotations/instances_train2017.json").write_text(
        json.dumps(dict(images=images, annotations=boxes, categories=[dict(id=1, name="person")])))
    people = dict(ID="a", gtboxes=[dict(tag="person", fbox=[1, 2, 5, 9], vbox=[1, 2, 5, 9], hbox=[1, 2, 3, 3])])
    (det / "crowdhuman/annotation_train.odgt").write_text(json.dumps(people) + "\n")
    monkeypatch.chdir(here)
    places = {"/data/det": str(det), "/data/kinetics": str(here), "runs/idfree-…": "run"}
    def made(words): return [reduce(lambda w, at: w.replace(*at), places.items(), word) for word in words]
    first, second = commands_of_readme("idfree")
    search, = commands_of_readme("find")
    asked = []
    for stage, words in (("idfree", first), ("find", search), ("idfree", second)):
        assert main([stage, *made(words), "--check"]) == 0, capsys.readouterr().err
        asked.append(json.loads(capsys.readouterr().out))
    assert [r["method"] for r in (asked[0], asked[2])] == ["image", "video"] and asked[0]["profile"] == "paper"
    assert asked[2]["found"] == asked[1], "the videos that find has looked at are those that are trained on"
    assert pd.Series(asked[1]).loc[["data", "stride", "frames"]].tolist() == ["videos", 5, "train"]

"""What a training on frames makes of odd boxes, frames and weights: a named error, or a result that is told."""
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cion_nb.core.runs import Run
from cion_nb.core.samples import make_samples, read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.data.scenes import BOX, frames_of, make_scenes
from cion_nb.detection.find import find_in
from cion_nb.detection.idfree import IdFree, idfree, make_pointid
from cion_nb.detection.pointid import decode, PointDetector, PointID, save_pointid
from cion_nb.identities.pseudo_labels import pseudo_labels
from cion_nb.models.backbones import create_backbone, save_backbone
from cion_nb.retrieval.person_search import evaluate_search

QUICK = dict(image_size=[64, 96], channels=8, dim=8, epochs=1, images_per_epoch=4, batch_size=4, lr_per=4, drops=[1.],
             precision="fp32", channels_last=False, transforms=[])


class Alone: num_processes = 1


def quick(data, **changes): return recipe("idfree", "tiny", **dict(data=str(data)) | QUICK | changes)


def scenes(folder, boxes, pictures=4, **columns):
    "The table of so many frames of 64x96, each with these boxes."
    rng = np.random.default_rng(0)
    for i in range(pictures):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(folder / f"{i}.png")
    names = np.repeat([f"{i}.png" for i in range(pictures)], len(boxes))
    table = make_scenes(names, np.tile(np.asarray(boxes, float), (pictures, 1)), **columns)
    write_samples(table, folder / "frames.parquet")
    return folder / "frames.parquet"


def loss_of(data, **changes):
    torch.manual_seed(0)
    task = IdFree(quick(data, **changes))
    task.build("cpu")
    batch = task.load(np.arange(4), 0)
    loss, told = task.loss(task.modules["model"], batch, Alone)
    return batch, loss, told


def test_boxes_outside_and_without_area_are_not_learned(tmp_path, runs):
    "One whole box, one half outside, one beyond, one of zero width, one that is ignored: two are left in each view."
    boxes = [(10, 10, 20, 40), (86, 20, 20, 30), (200, 5, 20, 40), (50, 10, 0, 30), (40, 5, 12, 30)]
    data = scenes(tmp_path, boxes, ignored=[False, False, False, False, True] * 4)
    batch, loss, _ = loss_of(data)
    assert len(batch["label"]) == 2 * 4 * 2 and (batch["label"] >= 0).all() and torch.isfinite(loss)
    assert sorted(batch["label"].tolist()) == sorted(2 * batch["label"].unique().tolist())      # both views, no others
    assert not batch["is_asked"].all()                                                          # the ignored region
    beyond = scenes(tmp_path, boxes[2:3])
    batch, loss, told = loss_of(beyond)
    assert len(batch["label"]) == 0 and torch.isfinite(loss) and told["identity"] == 0


def test_ten_thousand_boxes_in_a_frame(tmp_path, runs):
    "A cell has one person, so a frame of 384 cells teaches no more than so many; a detector gives no more than k."
    rng = np.random.default_rng(1)
    boxes = np.hstack([rng.uniform(0, [90, 50], (10_000, 2)), rng.uniform(3, 12, (10_000, 2))])
    batch, loss, _ = loss_of(scenes(tmp_path, boxes))
    counts = np.bincount(batch["image"].numpy(), minlength=8)
    assert counts.max() <= 16 * 24 and counts.min() > 200 and torch.isfinite(loss)
    maps = dict(heat=torch.zeros(1, 1, 100, 100), box=torch.ones(1, 4, 100, 100), offset=torch.zeros(1, 2, 100, 100),
                embedding=torch.ones(1, 4, 100, 100))
    assert len(decode(maps, 0., 500)[0][1]) == 500


def test_a_side_that_32_does_not_divide_is_padded_and_told(tmp_path, runs):
    data = scenes(tmp_path, [(10, 10, 20, 40)])
    run = idfree(quick(data, image_size=[60, 90]))
    assert run.result["padded"] == [64, 96] and "padded" not in idfree(quick(data)).result
    (boxes, _, _), = PointDetector(run.folder, min_score=0., k=3).detect([np.zeros((64, 96, 3), np.uint8)])
    assert (boxes[:, 2:] <= [96, 64]).all()


def test_a_memory_without_identities(tmp_path, runs):
    "Of boxes it needs none; of the table's people some."
    data = scenes(tmp_path, [(10, 10, 20, 40)])
    assert IdFree(quick(data, method="memory")).data.n_labels == 4
    with pytest.raises(ValueError, match=r"labels=pid \(method=memory\), and nobody in 4 boxes has an identity"):
        idfree(quick(data, method="memory", labels="pid"))


def test_weights_of_another_trunk(tmp_path, runs):
    "A run of another trunk, and a backbone's file of another architecture, are named."
    data = scenes(tmp_path, [(10, 10, 20, 40)])
    save_pointid(PointID("resnet10_tiny_ibn", channels=8, dim=8, size=(64, 96)), tmp_path / "run")
    with pytest.raises(ValueError, match="backbone='convnext_trial', but the network in weights has 'resnet10_tiny"):
        make_pointid(quick(data, backbone="convnext_trial", weights=str(tmp_path / "run")))
    save_backbone(create_backbone("resnet10_tiny_ibn", (64, 96)), tmp_path / "backbone.safetensors")
    with pytest.raises(ValueError, match="this checkpoint does not hold a convnext_trial"):
        make_pointid(quick(data, backbone="convnext_trial", weights=str(tmp_path / "backbone.safetensors")))
    with pytest.raises(ValueError, match="dla34 starts from none or imagenet; a file is of another backbone"):
        make_pointid(quick(data, backbone="dla34", weights=str(tmp_path / "backbone.safetensors")))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_pointid(quick(data, weights=str(tmp_path / "nowhere.safetensors")))


def test_a_backbone_of_cion_is_the_trunk(tmp_path, runs):
    "By the recipe of its pre-training, by its folder, and by its file: the trunk has its weights to the bit."
    asked = recipe("pretrain", "tiny", backbone="resnet10_tiny_ibn")
    backbone, run = create_backbone("resnet10_tiny_ibn", (64, 32)), Run(asked)
    save_backbone(backbone, run.request().folder / "backbone.safetensors")
    run.finish(dict(loss=0.))
    data = scenes(tmp_path, [(10, 10, 20, 40)])
    for weights in (asked, str(run.folder), str(run.folder / "backbone.safetensors")):
        net = make_pointid(quick(data, weights=weights))
        ours = net.trunk.net.state_dict()
        assert len(ours) > 10 and all(torch.equal(x, ours[k]) for k, x in backbone.state_dict().items())
    other = make_pointid(quick(data)).trunk.net.state_dict()
    assert any(not torch.equal(x, other[k]) for k, x in backbone.state_dict().items() if x.is_floating_point())


# ---------------------------------------------------------------- what is found

class Finds:
    "One box a frame, with a look that is said."
    settings = dict(name="finds")
    def __init__(self, look, score=1.): self.look, self.score = np.float32([look]), np.float32([score])
    def detect(self, frames): return [(np.array([[1, 2, 9, 30.]], np.float32), self.score, self.look) for _ in frames]


def test_looks_that_are_of_no_use_are_named_with_their_frame(tmp_path):
    frames = frames_of(read_samples(scenes(tmp_path, [(10, 10, 20, 40)], video="v", frame=np.arange(4))))
    with pytest.raises(ValueError, match="0.png: an embedding holds NaN"):
        find_in(frames, tmp_path, Finds([1, np.nan]), tmp_path / "nan")
    Image.open(tmp_path / "1.png").convert("L").save(tmp_path / "1.png")                        # grey is read
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:100])
    found = find_in(frames, tmp_path, Finds([1, 0]), tmp_path / "found", block=2)
    assert found.samples.path.tolist() == ["0.png", "1.png", "3.png"] and found.unreadable.path.tolist() == ["2.png"]
    parts = tmp_path / "parts"
    for shard in ((0, 2), (1, 2)): assert find_in(frames, tmp_path, Finds([1, 0]), parts, block=2, shard=shard) is None
    assert find_in(frames, tmp_path, Finds([1, 0]), parts, block=2).samples.equals(found.samples)
    mixed = tmp_path / "mixed"
    find_in(frames, tmp_path, Finds([1, 0]), mixed, block=2, shard=(0, 2))
    with pytest.raises(ValueError, match="embeddings of widths 2, 3: delete the folder"):
        find_in(frames, tmp_path, Finds([1, 0, 0]), mixed, block=2)
    with pytest.raises(ValueError, match="no box of 3 is in a track"):
        find_in(frames, tmp_path, Finds([1, 0], score=.5), tmp_path / "tracked", tracker="embedding")
    with pytest.raises(ValueError, match="tracklets are of videos, and frames here name none"):
        find_in(frames.assign(video=""), tmp_path, Finds([1, 0]), tmp_path / "nameless", tracker="embedding")


def test_pseudo_labels_name_looks_that_are_not_finite():
    samples = make_samples(list("abc"), video="v", frame=[0, 1, 2]).assign(score=1.)
    with pytest.raises(ValueError, match="1"): pseudo_labels(np.array([[1, 0], [np.nan, 0], [1, 0]]), samples)


def test_a_query_whose_frame_the_gallery_does_not_have():
    "It is asked in all frames: none is its own. Where nobody of it is there, it is named and in no mean."
    truth = make_samples(["a", "b"], pid=[1, 2]).assign(x=0, y=0, w=20, h=40)
    found, looks = truth.assign(score=1., pid=-1), np.eye(2)
    query = make_samples(["z", "z"], pid=[1, 9])
    with pytest.warns(UserWarning, match="1 query of 2 found in no frame of the gallery"):
        score = evaluate_search(query, np.eye(2), found, looks, truth, "prw")
    assert score.mAP == 1 and score.n_gallery == 2 and score.unmatched == ["z"]
    net = PointID("resnet10_tiny_ibn", channels=8, dim=8, size=(64, 96)).eval()
    with pytest.raises(ValueError, match="frame 0, boxes 1: without area, or their middle is outside of the frame"):
        net.embed_boxes(torch.zeros(1, 3, 64, 96), [pd.DataFrame([(1, 2, 9, 30), (300, 2, 9, 30)], columns=BOX)])


def test_a_video_of_one_frame_has_no_pair(street, tmp_path, runs):
    "Two frames of one video are needed: said before anything is trained."
    from cion_nb.core.samples import write_samples as write
    shutil.copytree(street.parent, tmp_path / "one")
    table = read_samples(street)
    write(table[table.frame == 2], tmp_path / "one" / "frames.parquet")
    save_pointid(PointID("resnet10_tiny_ibn", channels=8, dim=8, size=(64, 96)), tmp_path / "run")
    from cion_nb.detection.find import find
    data, start = str(tmp_path / "one" / "frames.parquet"), str(tmp_path / "run")
    asked = quick(data, method="video", weights=start, min_samples=1, min_score=0., min_span=0., eps=1.9,
                  found=recipe("find", "tiny", data=data, model=start, min_score=0., most=2))
    find(asked["found"])
    with pytest.raises(ValueError, match="no frame is left to train on"): idfree(asked)

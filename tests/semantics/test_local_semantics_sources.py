"""Networks as part sources: what they are fed and what becomes of their answers, by stand-ins and by the real ones."""
import sys
import types

import numpy as np
import pytest
import torch
from places import DATA

from cion_nb.core.images import open_image
from cion_nb.semantics.local_semantics import nearest_bone, part_source, PoseParts, SamParts, WorldParts

POSE = DATA / "weights" / "pose_landmark_full.tflite"
HAS_POSE = pytest.mark.skipif(not POSE.is_file(), reason="needs ../shared/data/weights/pose_landmark_full.tflite")
FIGURE = np.array([[.5, .1]] * 11 + [[.65, .2], [.35, .2], [.75, .33], [.25, .33], [.77, .47], [.23, .47]]
                  + [[.77, .5], [.23, .5]] * 3 + [[.6, .48], [.4, .48], [.62, .7], [.38, .7], [.64, .9], [.36, .9]]
                  + [[.64, .92], [.36, .92], [.68, .94], [.32, .94]] + [[.5, .5]] * 6)      # shares of a crop's sides


class Network:
    "Stands for LiteRT's interpreter: it finds one figure, wherever the crop is, and calls what is white the person."
    takes = dict(input_1=((1, 256, 256, 3), np.float32))
    gives = dict(heat=(1, 64, 64, 39), mask=(1, 256, 256, 1), points=(1, 195), flag=(1, 1))
    certainty = .9

    def __init__(self, model_path, num_threads): self.path = model_path
    def get_input_details(self):
        return [dict(name=k, index=i, shape=np.array(shape), dtype=dtype)
                for i, (k, (shape, dtype)) in enumerate(self.takes.items())]

    def get_output_details(self):
        return [dict(name=k, index=9 + i, shape=np.array(shape), dtype=np.float32)
                for i, (k, shape) in enumerate(self.gives.items())]

    def allocate_tensors(self): pass
    def invoke(self): pass
    def set_tensor(self, index, x):
        assert index == 0 and x.shape == (1, 256, 256, 3) and x.dtype == np.float32 and 0 <= x.min() <= x.max() <= 1
        self.x = x[0]

    def get_tensor(self, index):
        name = list(self.gives)[index - 9]
        if name == "flag": return np.full((1, 1), self.certainty, np.float32)
        is_grey = np.abs(self.x - 114 / 255).max(-1) < 1e-6
        rows, columns = np.flatnonzero(~is_grey.all(1)), np.flatnonzero(~is_grey.all(0))
        self.crop = top, left, h, w = rows[0], columns[0], len(rows), len(columns)
        Network.seen = self.crop
        if name == "mask": return np.where(self.x[None, ..., :1] > .9, 5, -5).astype(np.float32)
        points = np.zeros((39, 5), np.float32)
        points[:, :2] = FIGURE * [w, h] + [left, top]
        return points.reshape(1, 195)


@pytest.fixture
def network(monkeypatch, tmp_path):
    "A file, and a stand-in for whoever reads it."
    class Own(Network): pass
    package = types.SimpleNamespace(interpreter=types.SimpleNamespace(Interpreter=Own))
    monkeypatch.setitem(sys.modules, "ai_edge_litert", package)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", package.interpreter)
    Own.file = tmp_path / "pose.tflite"
    Own.file.write_bytes(b"pose")
    return Own


# --- a pose network

@pytest.mark.parametrize("h, w", [(128, 64), (256, 128), (60, 90), (31, 200), (300, 40)])
def test_points_come_back_in_pixels_of_the_crop(network, h, w):
    image = np.zeros((h, w, 3), np.uint8)
    image[:, w // 4:-(w // 4)] = 255
    points, logits, certainty = PoseParts(network.file).points(image)
    assert np.abs(points - FIGURE * [w, h]).max() < 1e-3 and logits.shape == (h, w) and certainty > .89
    top, left, height, width = Network.seen
    assert abs(height / width - h / w) < .08 * h / w and abs(2 * top + height - 256) <= 1
    assert height == 220 or width == 256 and height < 220, "86 % of the height, or the whole width"
    masks, person = PoseParts(network.file).parts([image])
    wrong = person[0] != (image[..., 0] > 0)
    assert wrong.mean() < .08 and masks.shape == (1, 3, h, w)
    assert (masks.sum(1) == person).all(), "disjoint, and all of the person"
    height = [np.nonzero(m)[0].mean() for m in masks[0]]
    assert sorted(height) == height


def test_a_pixel_goes_with_the_nearest_bone():
    "A loop over pixels and bones, in words of the spec."
    rng = np.random.default_rng(0)
    points, mask = FIGURE[:33] * [24, 40], rng.random((40, 24)) < .6
    bones = {1: [(7, 8), (2, 5), (9, 10), (0, 9), (0, 10), (2, 7), (5, 8)],
             2: [(11, 12), (11, 13), (13, 15), (12, 14), (14, 16), (11, 23), (12, 24), (23, 24)],
             3: [(23, 25), (25, 27), (27, 29), (29, 31), (27, 31), (24, 26), (26, 28), (28, 30), (30, 32), (28, 32)]}
    def far(p, a, b):
        along = np.clip((p - a) @ (b - a) / max((b - a) @ (b - a), 1e-6), 0, 1)
        return np.linalg.norm(p - a - along * (b - a))
    labels = nearest_bone(mask, points)
    assert ((labels > 0) == mask).all()
    for y, x in np.argwhere(mask):
        d = {a: min(far(np.array([x + .5, y + .5]), points[i], points[j]) for i, j in own) for a, own in bones.items()}
        assert d[labels[y, x]] <= min(d.values()) + 1e-6
    assert not nearest_bone(np.zeros((4, 4), bool), points).any()


def test_where_nobody_is_sure_nobody_is(network):
    network.certainty = .3
    white = np.full((2, 40, 20, 3), 255, np.uint8)
    masks, person = PoseParts(network.file).parts(white)
    assert not masks.any() and not person.any() and PoseParts(network.file, least=.2).parts(white)[1].any()
    assert PoseParts(network.file).parts(white[:0])[0].shape == (0, 3, 40, 20)


def test_a_file_of_another_signature_is_named(network):
    for takes, gives in ((dict(a=((1, 224, 224, 3), np.float32)), None), (dict(a=((1, 256, 256, 3), np.uint8)), None),
                         (None, dict(points=(1, 195), flag=(1, 1))), (None, dict(Network.gives, points=(1, 63)))):
        network.takes, network.gives = takes or Network.takes, gives or Network.gives
        with pytest.raises(ValueError, match="pose.tflite is no pose-landmark network: it takes"):
            PoseParts(network.file)


def test_a_missing_file_or_library_is_named(network, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no pose network at .*none.tflite"):
        PoseParts(network.file.with_name("none.tflite"))
    with pytest.raises(ValueError, match="several sizes"):
        PoseParts(network.file).parts([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)])
    with pytest.raises(ValueError, match="uint8 RGB"): PoseParts(network.file).parts(np.zeros((1, 4, 4, 3)))
    one, other = PoseParts(network.file).settings, PoseParts(network.file, least=.4).settings
    network.file.write_bytes(b"another")
    assert len({str(s) for s in (one, other, PoseParts(network.file).settings)}) == 3
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r'pip install "cion_nb\[parts\]"'): PoseParts(network.file)


def test_a_file_that_is_no_network_is_named(tmp_path):
    pytest.importorskip("ai_edge_litert.interpreter", reason="needs the extra [parts]")
    (tmp_path / "x.tflite").write_bytes(b"no network" * 99)
    with pytest.raises(ValueError, match="x.tflite is no .tflite file that can be"): PoseParts(tmp_path / "x.tflite")


def are_ordered(masks):
    "(N,) whether all three parts are there, head above upper body above lower body."
    n, y = masks.sum((2, 3)), np.arange(masks.shape[2])[:, None]
    height = (masks * y).sum((2, 3)) / np.maximum(n, 1)
    return (n > 0).all(1) & (np.diff(height, axis=1) > 0).all(1)


@HAS_POSE
@pytest.mark.slow("runs a real pose network")
def test_the_real_network_finds_the_worlds_parts(drawn):
    pytest.importorskip("ai_edge_litert.interpreter", reason="needs the extra [parts]")
    root, samples = drawn
    some = samples[samples.visibility > .9].iloc[:12].reset_index(drop=True)
    images = np.stack([np.asarray(open_image(root / path)) for path in some.path])
    (masks, person), (truth, _) = part_source(str(POSE)).parts(images), WorldParts(root).parts(images, some)
    both, either = (masks & truth).sum((2, 3)), np.maximum((masks | truth).sum((2, 3)), 1)
    assert (masks.sum(1) == person).all() and are_ordered(masks).mean() > .8
    assert ((both / either).mean(0) > [.5, .6, .6]).all()


@HAS_POSE
@pytest.mark.skipif(not (DATA / "viper").is_dir(), reason="needs ../shared/data/viper")
@pytest.mark.slow("runs a real pose network")
def test_the_real_network_finds_real_people():
    pytest.importorskip("ai_edge_litert.interpreter", reason="needs the extra [parts]")
    files = sorted((DATA / "viper" / "cam_a").glob("*.bmp"))[::40]
    masks, person = PoseParts(POSE).parts([np.asarray(open_image(file)) for file in files])
    assert len(files) > 12 and person.any((1, 2)).all() and are_ordered(masks).all() and .3 < person.mean() < .7


# --- R-CNNs and Segment Anything

class Sam(torch.nn.Module):
    "Takes and gives what `SamModel` does: surest around the mean of the points inside, far from those outside."
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(vision_config=types.SimpleNamespace(image_size=64))
        self.weight, self.calls = torch.nn.Parameter(torch.ones(1)), []

    def forward(self, pixel_values, input_points, input_labels, multimask_output):
        self.calls.append((pixel_values, input_points, input_labels))
        assert not multimask_output and input_labels.dtype == torch.int64
        inside = input_labels[0][..., None]
        middle = (input_points[0] * inside).sum(1) / inside.sum(1)
        y = torch.arange(16.) * 4 + 2
        far = (y[None, :, None] - middle[:, 1, None, None]).abs().expand(3, 16, 16)
        return types.SimpleNamespace(pred_masks=(8 - far)[None, :, None])


class Found(torch.nn.Module):
    "A detector that has its answer ready."
    def __init__(self, **answer):
        super().__init__()
        self.weight, self.answer = torch.nn.Parameter(torch.ones(1)), answer
    def forward(self, images):
        assert all(x.dtype == torch.float32 and 0 <= x.min() <= x.max() <= 1 for x in images)
        return [self.answer for _ in images]


def somebody(h=128, w=64):
    "Mask R-CNN's and keypoint R-CNN's answers about a large person, a small one, and a dog that is larger than both."
    boxes = torch.tensor([[2, 2, 12, 30], [16, 4, 48, 124], [0, 0, 64, 128]], dtype=torch.float32)
    masks = torch.zeros(3, 1, h, w)
    for m, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()): m[0, y0:y1, x0:x1] = .9
    order = FIGURE[[0, 1, 4, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28]] * [32, 120] + [16, 4]
    joints = torch.from_numpy(np.concatenate([order, np.ones((17, 1))], 1)).float()
    finds = Found(boxes=boxes, labels=torch.tensor([1, 1, 18]), scores=torch.tensor([.99, .8, .95]), masks=masks)
    return finds, Found(boxes=boxes[:2], scores=torch.ones(2), keypoints=torch.stack([0 * joints, joints]))


def test_all_joints_prompt_each_part():
    sam = Sam()
    source = SamParts(*somebody(), sam, device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 64, 3), np.uint8)
    masks, person = source.parts(images)
    pixels, points, inside = sam.calls[0]
    assert pixels.shape == (1, 3, 64, 64) and (pixels[..., 32:] == 0).all() and len(sam.calls) == 2
    mean, std = (np.array(v)[:, None, None] for v in ((.485, .456, .406), (.229, .224, .225)))
    small = images[0].reshape(64, 2, 32, 2, 3).mean((1, 3)).transpose(2, 0, 1) / 255
    assert np.corrcoef(pixels[0, :, :, :32].numpy().ravel(), ((small - mean) / std).ravel())[0, 1] > .8
    assert points.shape == (1, 3, 17, 2) and (points[0, 0] == points[0, 1]).all()
    assert torch.allclose(points[0, 0, 0], torch.tensor([16 + 16., 4 + 12.]) / 2)
    assert [row.nonzero()[:, 0].tolist() for row in inside[0]] == [[*range(5)], [*range(5, 13)], [*range(13, 17)]]
    assert person[0, 4:124, 16:48].all() and person[0].sum() == 120 * 32, "the largest person, not the dog"
    assert (masks.sum(1) <= 1).all() and not (masks.any(1) & ~person).any() and are_ordered(masks).all()
    assert (person & ~masks.any(1)).any(), "where SAM says no to all parts, the person has none"


def test_nobody_and_nobody_with_joints():
    finds, joints = somebody()
    images = np.zeros((1, 128, 64, 3), np.uint8)
    masks, person = SamParts(finds, joints, Sam(), least=.999, device="cpu").parts(images)
    assert not person.any() and not masks.any()
    none = Found(boxes=torch.zeros(0, 4), scores=torch.zeros(0), keypoints=torch.zeros(0, 17, 3))
    masks, person = SamParts(finds, none, Sam(), device="cpu").parts(images)
    assert person.any() and not masks.any()
    assert SamParts(finds, joints, Sam(), device="cpu").parts(images[:0])[0].shape == (0, 3, 128, 64)


def test_without_weights_it_refuses(tmp_path, monkeypatch):
    finds, joints = somebody()
    with pytest.raises(ValueError, match="no weights for detector and sam"): SamParts(None, joints, None)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"): SamParts(tmp_path / "none.pth", joints, Sam())
    with pytest.raises(FileNotFoundError, match="no SamModel in"): SamParts(finds, joints, tmp_path)
    torch.save(dict(other=torch.ones(1)), tmp_path / "other.pth")
    built = {}
    monkeypatch.setattr("torchvision.models.get_model", lambda name, **kw: built.update({name: kw}) or Found())
    with pytest.raises(ValueError, match="other.pth does not hold the entries of this Found"):
        SamParts(finds, tmp_path / "other.pth", Sam())
    assert built == dict(keypointrcnn_resnet50_fpn=dict(weights=None, weights_backbone=None)), "nothing is fetched"
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "cion_nb\[sam\]"'): SamParts(finds, joints, tmp_path)
    with pytest.raises(ValueError, match="no part source in a b"): part_source("a", "b")
    one, other = SamParts(finds, joints, Sam()).settings, SamParts(finds, joints, Sam(), least=.3).settings
    assert one != other and set(one) == {"source", "least", "detector", "keypoints", "sam"}


@pytest.mark.slow("builds two R-CNNs")
def test_torchvisions_networks_give_what_is_needed(tmp_path):
    "Random weights, which find something where little is asked of them."
    from torchvision.models.detection import KeypointRCNN, MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    torch.manual_seed(0)
    few = dict(min_size=64, max_size=64, box_score_thresh=0., box_detections_per_img=8, rpn_post_nms_top_n_test=8)
    detector, keypoints = (kind(resnet_fpn_backbone(backbone_name="resnet18", weights=None), n, **few)
                           for kind, n in ((MaskRCNN, 91), (KeypointRCNN, 2)))
    detector.roi_heads.box_predictor.cls_score.bias.data[1] += 9                   # everything is a person
    sam = Sam()
    source = SamParts(detector, keypoints, sam, least=0., device="cpu")
    masks, person = source.parts(np.random.default_rng(0).integers(0, 256, (1, 64, 32, 3), np.uint8))
    assert masks.shape == (1, 3, 64, 32) and (masks.sum(1) <= 1).all() and not (masks.any(1) & ~person).any()
    assert len(sam.calls) == 1 and sam.calls[0][1].shape == (1, 3, 17, 2) and not detector.training


def test_transformers_sam_takes_these_prompts(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra [sam]")
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16, mlp_dim=16,
                  output_channels=16, window_size=2, global_attn_indexes=[0], num_pos_feats=8)
    prompts = dict(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4)
    decoder = dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16)
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    torch.manual_seed(0)
    transformers.SamModel(config).save_pretrained(tmp_path / "sam")
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 64, 3), np.uint8)
    made = [SamParts(*somebody(), tmp_path / "sam", device="cpu") for _ in range(2)]
    answers = [source.parts(images) for source in made]
    assert (answers[0][0] == answers[1][0]).all() and made[0].settings == made[1].settings
    masks, person = answers[0]
    assert (masks.sum(1) <= 1).all() and not (masks.any(1) & ~person).any() and person[0].sum() == 120 * 32

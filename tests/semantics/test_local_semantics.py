"""Masks and crops of parts: their contract, the formula as an oracle, and nothing of the background in any crop."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cion_nb.core.images import open_image
from cion_nb.data.film import read_truth
from cion_nb.data.people import PARTS
from cion_nb.semantics.local_semantics import (
    local_crops,
    NO_PART,
    part_boxes,
    PartSource,
    to_labels,
    to_masks,
    WorldParts,
)

MEAN = torch.tensor([124, 116, 104], dtype=torch.uint8)


def drawing(seed, h=40, w=24):
    "An image (h, w, 3) and a label map (h, w) with blobs of all labels."
    rng = np.random.default_rng(seed)
    labels = np.zeros((h, w), np.uint8)
    for a in (4, 3, 2, 1):
        top, left = rng.integers(0, h - 6), rng.integers(0, w - 6)
        labels[top:top + rng.integers(2, 14), left:left + rng.integers(2, 10)] = a
    labels[rng.random((h, w)) < .1] = 0
    return rng.integers(0, 256, (h, w, 3), np.uint8), labels


def oracle(image, mask, size, mode="bicubic"):
    "The formula, step by step."
    mixed = np.where(mask[..., None], image, MEAN.numpy())
    y, x = np.nonzero(mask)
    if not len(y): return MEAN[:, None, None].expand(3, *size)
    cut = torch.from_numpy(mixed[y.min():y.max() + 1, x.min():x.max() + 1]).permute(2, 0, 1)[None]
    return F.interpolate(cut, size, mode=mode, antialias=True)[0]


@pytest.mark.parametrize("size, mode", [((128, 64), "bicubic"), ((16, 8), "bilinear"), ((33, 7), "bicubic")])
def test_crops_are_the_formula(size, mode):
    drawn = [drawing(seed, 30 + seed, 20 + seed % 3) for seed in range(8)]
    images, maps = zip(*drawn)
    crops, weight = local_crops(list(images), list(maps), size, mode)
    assert crops.shape == (8, 3, 3, *size) and crops.dtype == torch.uint8 and weight.dtype == torch.float32
    for i, (image, labels) in enumerate(drawn):
        for a in range(3):
            mask = labels == a + 1
            assert (crops[i, a].int() - oracle(image, mask, size, mode).int()).abs().max() <= 1    # memory formats
            assert weight[i, a] == (mask.sum() >= .01 * mask.size)


def test_images_and_masks_of_every_form_are_one():
    images, maps = (np.stack(x) for x in zip(*map(drawing, range(3))))
    masks, _ = to_masks(maps)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    crops, weight = local_crops(images, masks)
    for x in (list(images), tensors, list(tensors)):
        for m in (maps, list(maps), masks, torch.from_numpy(masks)):
            again = local_crops(x, m)
            assert (again[0] == crops).all() and (again[1] == weight).all()


@pytest.mark.parametrize("seed", range(4))
def test_background_is_in_no_crop(seed):
    "Whatever stands outside the parts, a bag of the person included: every bit stays."
    image, labels = drawing(seed)
    crops, weight = local_crops([image], [labels])
    for fill in (0, 255, np.random.default_rng(seed).integers(0, 256, image.shape, np.uint8)):
        other = np.where(np.isin(labels, (1, 2, 3))[..., None], image, fill).astype(np.uint8)
        again = local_crops([other], [labels])
        assert (again[0] == crops).all() and (again[1] == weight).all()
    for a in range(3):                                     # and other parts are in none, either
        other = np.where((labels == a + 1)[..., None], image, 7).astype(np.uint8)
        assert (local_crops([other], [labels])[0][0, a] == crops[0, a]).all()


def test_a_part_counts_from_a_hundredth_on():
    image, labels = np.zeros((40, 20, 3), np.uint8), np.zeros((40, 20), np.uint8)
    labels[3, :8], labels[9, :7] = 1, 2                    # 8 and 7 of 800 pixels
    crops, weight = local_crops([image], [labels])
    assert weight.tolist() == [[1, 0, 0]]
    assert (crops[0, 1] == 0).any(), "what is little is cut all the same"
    assert (crops[0, 2] == MEAN[:, None, None]).all()
    assert local_crops([image], [labels], least=.005)[1].tolist() == [[1, 1, 0]]
    tiny = np.zeros((4, 4), np.uint8)
    assert local_crops([image[:4, :4]], [tiny])[1].tolist() == [[0, 0, 0]], "no pixel of 16 is less than a hundredth"


def test_nobody_anywhere():
    images, maps = np.zeros((3, 20, 10, 3), np.uint8), np.zeros((3, 20, 10), np.uint8)
    crops, weight = local_crops(images, maps)
    assert not weight.any() and (crops == MEAN[:, None, None]).all()
    crops, weight = local_crops([], [])
    assert crops.shape == (0, 3, 3, 128, 64) and weight.shape == (0, 3)
    person_only = np.full((1, 20, 10), NO_PART, np.uint8)
    masks, person = to_masks(person_only)
    assert person.all() and not masks.any() and not local_crops(images[:1], person_only)[1].any()


def test_masks_of_other_images_are_refused():
    images, maps = (np.stack(x) for x in zip(*map(drawing, range(3))))
    with pytest.raises(ValueError, match="3 images and 2 masks"): local_crops(images, maps[:2])
    with pytest.raises(ValueError, match=r"masks \(39, 24\) for image 1, \(40, 24\): they need its size"):
        local_crops(list(images), [maps[0], maps[1][:-1], maps[2]])
    with pytest.raises(ValueError, match="uint8"): local_crops(images / 255, maps)
    masks, person = to_masks(maps)
    for odd, word in ((masks[:, :2], "3, H, W"), (masks.astype(int), "bool"), (masks[0], "3, H, W")):
        with pytest.raises(ValueError, match=word): to_labels(odd)
    with pytest.raises(ValueError, match="as many, of their size"): to_labels(masks[:2], person[:2], images)
    with pytest.raises(ValueError, match="as many, of their size"): to_labels(masks[..., :-1], person[..., :-1], images)
    with pytest.raises(ValueError, match="as many, of their size"): to_labels(masks, person[:, 1:])


def test_masks_that_overlap_or_leave_the_person_are_refused():
    masks, person = to_masks(np.stack([drawing(1)[1], drawing(2)[1]]))
    both, n = masks.copy(), int(masks[1, 1].sum())
    both[1, 0] |= masks[1, 1]
    with pytest.raises(ValueError, match=rf"parts of image 1 overlap in {n} pixels"):
        to_labels(both, person)
    with pytest.raises(ValueError, match="parts of image 0 leave the person"): to_labels(masks, person & ~masks[:, 1])
    assert (to_labels(masks) == np.where(to_labels(masks, person) == NO_PART, 0, to_labels(masks, person))).all()


def test_boxes_hold_their_part():
    for seed in range(20):
        _, labels = drawing(seed)
        boxes, pixels = part_boxes(labels)
        for a, (top, left, h, w) in enumerate(boxes.tolist()):
            own = labels == a + 1
            inside = own[top:top + h, left:left + w]
            assert pixels[a] == own.sum() == inside.sum()
            if own.any(): assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            else: assert (top, left, h, w) == (0, 0, 0, 0)


@pytest.mark.slow("draws a world")
def test_the_worlds_parts_are_its_truth(drawn):
    root, samples = drawn
    images = np.stack([np.asarray(open_image(root / path)) for path in samples.path])
    masks, person = WorldParts(root).parts(images, samples)
    assert (masks.sum(1) <= 1).all() and not (masks.any(1) & ~person).any()
    truth = read_truth(root, samples)
    others = [PARTS.index(p) for p in ("background", "other person", "occluder")]
    assert (person == ~np.isin(truth.parts, others)).all()
    assert (masks[:, 0] == np.isin(truth.parts, [PARTS.index("hair"), PARTS.index("face")])).all()
    bag = truth.parts == PARTS.index("bag")
    assert bag.any() and (person & ~masks.any(1) == bag).all()
    y = np.arange(images.shape[1])[:, None]
    seen = (masks.sum((2, 3)) > 20).all(1)
    height = (masks * y).sum((2, 3))[seen] / masks.sum((2, 3))[seen]
    assert seen.mean() > .8 and (np.diff(height, axis=1) > 0).all(), "from head to feet"
    joint = truth.joints[:, 1]                                                     # the head's
    at = np.floor(joint[seen & truth.seen[:, 1]]).astype(int)
    assert masks[seen & truth.seen[:, 1], 0, at[:, 1], at[:, 0]].mean() > .9


@pytest.mark.slow("draws a world")
def test_the_world_knows_its_crops_at_any_size_and_in_any_order(drawn):
    root, samples = drawn
    some = samples.iloc[[7, 2, 5]].reset_index(drop=True)
    images = [open_image(root / path) for path in some.path]
    half = np.stack([np.asarray(image.resize((32, 64))) for image in images])
    masks, person = WorldParts(root).parts(half, some)
    whole, _ = WorldParts(root).parts(np.stack([np.asarray(image) for image in images]), some)
    assert masks.shape == (3, 3, 64, 32)
    for small, large in zip(masks.reshape(-1, 64, 32), whole.reshape(-1, 128, 64)):
        again = np.asarray(Image.fromarray(large).resize((32, 64), Image.NEAREST))
        assert (small == again).all()
    with pytest.raises(TypeError, match="knows a crop by its row"): WorldParts(root).parts(half)
    with pytest.raises(ValueError, match="3 images and 2 rows"): WorldParts(root).parts(half, some[:2])
    with pytest.raises(FileNotFoundError): WorldParts(root / "crops")


def test_a_source_without_parts_says_so():
    with pytest.raises(NotImplementedError, match="PartSource is a part source without `parts`"):
        PartSource().parts(np.zeros((1, 4, 4, 3), np.uint8))

"""Views of frames: boxes move as their corners and as their pixels; numbers depend on their names alone."""
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision.transforms.v2 import functional as V

from cion_nb.detection import scene_pairs as S
from cion_nb.detection.scene_pairs import ScenePairs

pytest.importorskip("cv2")


def picture(h=90, w=160, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h // 10, w // 10, 3), np.uint8).repeat(10, 0).repeat(10, 1)


def some_boxes(n, h=90, w=160, seed=0):
    rng = np.random.default_rng(seed)
    wide, high = rng.uniform(4, w / 3, n), rng.uniform(4, h / 2, n)
    return np.stack([rng.uniform(0, w - wide), rng.uniform(0, h - high), wide, high], 1)


def by_corners(matrix, box):
    x, y, w, h = box
    points = [matrix @ (a, b, 1) for a in (x, x + w) for b in (y, y + h)]
    low, high = [min(p[i] for p in points) for i in range(2)], [max(p[i] for p in points) for i in range(2)]
    return [*low, high[0] - low[0], high[1] - low[1]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 5))
def test_boxes_move_as_their_corners(seed, n):
    rng = np.random.default_rng(seed)
    boxes = some_boxes(n, seed=seed)
    for matrix in (S.rotation(rng.uniform(-10, 10), 160, 90), S.mirror(160), S.zoom(.3 * rng.random(4), 160, 90),
                   S.scale(*rng.uniform(.2, 3, 2), *rng.uniform(-9, 9, 2))):
        want = np.array([by_corners(matrix, box) for box in boxes]).reshape(-1, 4)
        np.testing.assert_allclose(S.move_boxes(matrix, boxes), want, atol=1e-9)
    np.testing.assert_allclose(S.move_boxes(S.mirror(160) @ S.mirror(160), boxes), boxes, atol=1e-9)
    angle = rng.uniform(-10, 10)
    turn = S.rotation(angle, 160, 90)
    np.testing.assert_allclose(turn @ S.rotation(-angle, 160, 90), np.eye(3), atol=1e-9)
    r = .3 * rng.random(4)
    kept = [[160 * r[0], 90 * r[1], 160 * (1 - r[0] - r[2]), 90 * (1 - r[1] - r[3])]]
    np.testing.assert_allclose(S.move_boxes(S.zoom(r, 160, 90), kept), [[0, 0, 160, 90]], atol=1e-9)


def test_rotation_is_counter_clockwise_as_torchvision_turns():
    "The pixel that a point lands on, in their picture and by our matrix."
    image = torch.zeros(1, 101, 101)
    image[0, 20, 70] = 1
    turned = V.rotate(image, 10, interpolation=V.InterpolationMode.BILINEAR)[0]
    y, x = np.unravel_index(turned.argmax(), turned.shape)
    np.testing.assert_allclose((S.rotation(10, 101, 101) @ (70.5, 20.5, 1))[:2], (x + .5, y + .5), atol=.8)


@pytest.mark.parametrize("factor", [.9, .97, 1., 1.1])
@pytest.mark.parametrize("which, theirs", [("brightness", V.adjust_brightness), ("contrast", V.adjust_contrast),
                                           ("saturation", V.adjust_saturation)])
def test_colours_are_torchvisions(which, theirs, factor):
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    want = theirs(torch.from_numpy(image).permute(2, 0, 1), factor).permute(1, 2, 0).numpy()
    assert np.abs(S.change_colour(image, which, factor).astype(int) - want).max() <= 1   # they cut, we round


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_a_patch_is_in_its_box_and_no_more_than_its_share(seed):
    rng = np.random.default_rng(seed)
    box, share = rng.uniform(0, 80, 4), .4 * rng.random()
    left, top, right, bottom = S.patch_of(box, share, *rng.uniform([-1, 0, 0], 1))
    assert (right - left) * (bottom - top) <= share * box[2] * box[3]
    if right > left and bottom > top:
        assert box[0] <= left and box[1] <= top and right <= box[0] + box[2] and bottom <= box[1] + box[3]


def test_patches_are_large_enough_to_hide_and_go_everywhere():
    rng = np.random.default_rng(0)
    covered = np.zeros((60, 40), int)
    for _ in range(2_000):
        left, top, right, bottom = S.patch_of((0, 0, 40, 60), .4 * rng.random(), *rng.uniform([-1, 0, 0], 1))
        covered[top:bottom, left:right] += 1
    assert .15 < covered.mean() / 2_000 < .2 and covered.min() > 0       # the mean share is a fifth, rounded down


@pytest.mark.parametrize("height, limit", [(608, 64), (304, 32)])
def test_small_boxes_are_never_covered(height, limit):
    make, image = ScenePairs((height, height), dict(occlude=1.)), np.full((height, height, 3), 9, np.uint8)
    small = make(image, [[20, 20, limit, height / 2], [120, 30, limit * 2, limit]], 0)
    assert (small.images == 9).all()
    large = make(image, [[20, 20, limit + 1, height / 2]], 1)
    assert (large.images != 9).any(axis=(1, 2, 3)).all()
    for view in large.images:
        rows, columns = np.nonzero((view != 9).any(2))
        assert min(rows.min(), columns.min()) >= 20
        assert columns.max() < 20 + limit + 1 and rows.max() < 20 + height / 2
        assert len(rows) <= .4 * (limit + 1) * height / 2


def test_draws_stay_in_their_ranges_and_happen_as_often_as_asked():
    make = ScenePairs(transforms=dict(S.TRANSFORMS), seed=5)
    drawn = [make._draws(row, 0, view, 3) for row in range(500) for view in range(2)]
    degrees = np.array([d.degrees for d in drawn])
    assert np.abs(degrees).max() <= 10 and degrees.min() < -9 and degrees.max() > 9
    cuts = np.array([d.zoom for d in drawn])
    assert cuts.max() <= .3 and cuts.max() > .28 and .45 < (cuts.sum(1) > 0).mean() < .55
    factors = np.array([[f for _, f in d.colours] for d in drawn])
    assert factors.min() >= .9 and factors.max() <= 1.1 and len({tuple(w for w, _ in d.colours) for d in drawn}) == 6
    assert .45 < np.mean([d.mirrors for d in drawn]) < .55 and .45 < np.mean([d.blur is not None for d in drawn]) < .55
    shares = np.array([p[0] for d in drawn for p in d.patches if p])
    assert 0 <= shares.min() and .39 < shares.max() <= .4 and .47 < len(shares) / 3_000 < .53


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(90, 160), (200, 160), (64, 300)]))
def test_a_box_is_where_its_pixels_are(seed, size):
    "A bright spot in the middle of a box, whatever moved it, and however the frame fits into the input."
    rng = np.random.default_rng(seed)
    h, w = 120, 200
    box = np.array([rng.integers(20, 140), rng.integers(20, 70), 30, 30])
    image = np.zeros((h, w, 3), np.uint8)
    image[box[1] + 12:box[1] + 18, box[0] + 12:box[0] + 18] = 255
    made = ScenePairs(size, dict(rotate=1., mirror=.5, zoom=.7), seed, (0, 0, 0))(image, box, row=seed)
    for view, moved, left in zip(made.images, made.boxes[:, 0], made.visible[:, 0]):
        if left < .999: continue
        weight = view[..., 0].astype(float)
        middle = [(weight.sum(axis) @ np.arange(size[1 - axis])) / weight.sum() + .5 for axis in (0, 1)]
        assert np.abs(moved[:2] + moved[2:] / 2 - middle).max() < .3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 6))
def test_boxes_are_cut_at_the_frame_and_say_how_much_is_left(seed, n):
    boxes = some_boxes(n, seed=seed) + np.random.default_rng(seed).uniform(-30, 30, (n, 4)) * [1, 1, 0, 0]
    made = ScenePairs((96, 96), seed=seed)(picture(), boxes, row=3)
    edge = (96 - 54) // 2                                                   # 160x90 in 96x96
    low, high = made.boxes[..., :2], made.boxes[..., :2] + made.boxes[..., 2:]
    assert (low[..., 0] >= 0).all() and (high[..., 0] <= 96 + 1e-3).all()
    assert (low[..., 1] >= edge).all() and (high[..., 1] <= edge + 54 + 1e-3).all()
    assert (made.visible >= 0).all() and (made.visible <= 1 + 1e-9).all()
    assert np.array_equal(made.is_asked, (made.visible >= .25).all(0))
    assert ((made.boxes[..., 2:] > 0).all(-1) == (made.visible > 0)).all()


def test_the_same_name_gives_the_same_pair_in_any_worker():
    image, boxes, make = picture(), some_boxes(5), ScenePairs((90, 160), seed=7)
    want = [make(image, boxes, row) for row in range(8)]
    with ThreadPoolExecutor(3) as pool: found = list(pool.map(lambda row: make(image, boxes, row), reversed(range(8))))
    for a, b in zip(want, reversed(found)):
        assert np.array_equal(a.images, b.images) and np.array_equal(a.boxes, b.boxes)
    assert not np.array_equal(want[0].images[0], want[0].images[1]), "two views are drawn apart"
    others = (make(image, boxes, 0, epoch=1), ScenePairs((90, 160), seed=8)(image, boxes, 0), want[1])
    assert all(not np.array_equal(want[0].images, other.images) for other in others)
    fewer = make(image, boxes[:2], 0)                                     # who else is in the frame moves nobody
    assert np.array_equal(fewer.boxes, want[0].boxes[:, :2])


def test_identities_have_no_way_in_and_inputs_stay():
    image, boxes = picture(), some_boxes(5)
    before = image.copy(), boxes.copy()
    ScenePairs((90, 160), dict.fromkeys(S.TRANSFORMS, 1.))(image, boxes, 0)
    assert np.array_equal(image, before[0]) and np.array_equal(boxes, before[1])


@settings(max_examples=20, deadline=None)
@given(st.floats(1, 12), st.floats(0, 180))
def test_motion_blur_keeps_the_light_and_runs_along_its_line(length, degrees):
    kernel = S.motion_kernel(length, degrees)
    assert kernel.sum() == pytest.approx(1, abs=1e-5) and kernel.min() >= 0 and len(kernel) % 2
    y, x = np.mgrid[:len(kernel), :len(kernel)] - len(kernel) // 2
    a = math.radians(degrees)
    across = (kernel * (x * -math.sin(a) + y * math.cos(a))**2).sum()
    along = (kernel * (x * math.cos(a) + y * math.sin(a))**2).sum()
    assert across < .3 and along == pytest.approx(length**2 / 12, abs=.6)


def test_ten_thousand_boxes_and_none():
    made = ScenePairs((90, 160))(picture(), some_boxes(10_000), 0)
    assert made.boxes.shape == (2, 10_000, 4)
    assert ScenePairs((90, 160))(picture(), np.empty((0, 4)), 0).is_asked.shape == (0,)

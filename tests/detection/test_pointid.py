"""PointID's maps against loops, there and back, over trunks of all families, for given boxes, and as a detector."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from cion_nb.detection.pointid import (
    at_cells,
    decode,
    detection_loss,
    encode,
    load_pointid,
    OVERLAP,
    padded,
    peaks,
    PointDetector,
    PointID,
    radius_of,
    save_pointid,
    STRIDE,
    Trunk,
)
from cion_nb.models.architectures import list_backbones

SIZE = (96, 160)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return PointID("resnet10_tiny_ibn", channels=16, dim=12, size=SIZE).eval()


def some_boxes(seed, n=12, size=SIZE, beyond=10.):
    g = np.random.default_rng(seed)
    corner = np.stack([g.uniform(-beyond, size[1], n), g.uniform(-beyond, size[0], n)], 1)
    return np.hstack([corner, g.uniform(1, 50, (n, 2))])


def bells_by_hand(boxes, size):
    "Each cell's highest bell, by the formula; a bell ends where its radius does."
    h, w = (math.ceil(side / STRIDE) for side in size)
    heat, taken = np.zeros((h, w)), {}
    for x, y, bw, bh in sorted(boxes.tolist(), key=lambda b: -b[2] * b[3]):
        cx, cy = (x + bw / 2) / STRIDE, (y + bh / 2) / STRIDE
        if not (0 <= cx < w and 0 <= cy < h) or bw <= 0 or bh <= 0 or (int(cx), int(cy)) in taken: continue
        taken[int(cx), int(cy)] = True
        r = int(radius_of(np.array(bw / STRIDE), np.array(bh / STRIDE)))
        for i in range(h):
            for j in range(w):
                di, dj = i - int(cy), j - int(cx)
                if max(abs(di), abs(dj)) > r: continue
                heat[i, j] = max(heat[i, j], math.exp(-(di**2 + dj**2) / (2 * ((2 * r + 1) / 6)**2)))
    return heat, len(taken)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 20))
def test_the_heat_map_is_the_formula(seed, n):
    boxes = some_boxes(seed, n)
    targets, (heat, m) = encode(boxes, SIZE), bells_by_hand(boxes, SIZE)
    np.testing.assert_allclose(targets.heat, heat, atol=1e-6)
    assert (targets.heat == 1).sum() == m == len(targets.cell) == len(set(targets.cell.tolist()))
    assert (targets.heat.ravel()[targets.cell] == 1).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(.3, 80), st.floats(.3, 80), st.floats(.3, .9))
def test_a_radius_keeps_the_overlap_and_no_larger_one_does(w, h, overlap):
    def shared(r):
        inner = max(w - 2 * r, 0) * max(h - 2 * r, 0)
        along = max(w - r, 0) * max(h - r, 0)
        return min(inner / (w * h), along / (2 * w * h - along), w * h / ((w + 2 * r) * (h + 2 * r)))

    r = float(radius_of(np.array(w), np.array(h), overlap))
    assert r >= 0 and shared(r) == pytest.approx(overlap, abs=1e-6) and shared(r * 1.01 + 1e-6) < overlap


def maps_of(targets, n_numbers, dim=5, seed=0):
    h, w = targets.heat.shape
    sides = targets.sides if n_numbers == 4 else targets.sides[:, :2] + targets.sides[:, 2:]
    box, offset = torch.zeros(n_numbers, h * w), torch.zeros(2, h * w)
    box[:, targets.cell], offset[:, targets.cell] = torch.tensor(sides.T), torch.tensor(targets.offset.T)
    x = torch.randn(dim, h, w, generator=torch.Generator().manual_seed(seed))
    return dict(heat=torch.logit(torch.tensor(targets.heat))[None, None], box=box.view(1, -1, h, w),
                offset=offset.view(1, 2, h, w), embedding=x[None])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 25), st.sampled_from([4, 2]))
def test_there_and_back_within_a_pixel(seed, n, n_numbers):
    "Also neighbours: two middles side by side are both peaks, since neither exceeds the other."
    boxes = some_boxes(seed, n)
    targets = encode(boxes, SIZE)
    maps = maps_of(targets, n_numbers)
    found, scores, x = (part.numpy() for part in decode(maps, threshold=.9999)[0])
    wanted = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])[targets.rows]
    assert len(found) == len(wanted)
    if not len(wanted): return
    far = np.abs(found[:, None] - wanted[None]).max(2)
    assert (far.min(0) < 1).all() and sorted(far.argmin(0).tolist()) == list(range(len(wanted)))
    vectors = at_cells(maps["embedding"], torch.zeros(len(targets.cell), dtype=torch.long), torch.tensor(targets.cell))
    np.testing.assert_allclose(x[far.argmin(0)], F.normalize(vectors, dim=1).numpy(), rtol=1e-5, atol=1e-6)


def test_two_people_in_a_cell_are_one_the_larger():
    boxes = np.array([[41, 41, 6, 6], [30, 30, 28, 29.], [90, 50, 10, 20]])
    assert encode(boxes, SIZE).rows.tolist() == [1, 2]


def test_an_ignored_region_asks_for_nothing_but_its_known_middles():
    boxes = np.array([[40, 20, 20, 40], [0, 0, 100, 96.]])
    targets = encode(boxes, SIZE, np.array([False, True]))
    assert targets.rows.tolist() == [0] and not targets.is_asked[:, :10].any() and targets.is_asked[:, 25:].all()
    assert targets.is_asked.ravel()[targets.cell].all()
    far = torch.full((1, *targets.heat.shape), 9.)
    far[0, :, 25:] = -9
    far.view(-1)[targets.cell] = 9
    batch = dict(heat=torch.tensor(targets.heat)[None], is_asked=torch.tensor(targets.is_asked)[None],
                 image=torch.tensor([0]), cell=torch.tensor(targets.cell), sides=torch.tensor(targets.sides),
                 offset=torch.tensor(targets.offset))
    maps = maps_of(targets, 4) | dict(heat=far[None])
    assert detection_loss(maps, batch)[0] < 1e-3
    assert detection_loss(maps, batch | dict(is_asked=torch.ones(1, *targets.heat.shape, dtype=torch.bool)))[0] > 10


def test_ten_thousand_boxes_in_a_frame():
    targets = encode(some_boxes(1, 10_000, (1080, 1920)), (1080, 1920))
    assert len(targets.cell) == len(np.unique(targets.cell)) > 8000
    assert len(decode(maps_of(targets, 4), threshold=.9999, k=500)[0][0]) == 500


def test_gradients_reach_heads_by_what_is_asked(net):
    "Finite differences of the loss in the maps."
    targets = encode(some_boxes(3, 4), SIZE)
    g = torch.Generator().manual_seed(1)
    h, w = targets.heat.shape
    numbers = dict(heat=1, box=4, offset=2)
    maps = {name: torch.randn(1, n, h, w, generator=g).requires_grad_() for name, n in numbers.items()}
    batch = dict(heat=torch.tensor(targets.heat)[None], is_asked=torch.tensor(targets.is_asked)[None],
                 image=torch.zeros(len(targets.cell), dtype=torch.long), cell=torch.tensor(targets.cell),
                 sides=torch.tensor(targets.sides), offset=torch.tensor(targets.offset))
    detection_loss(maps, batch)[0].backward()
    for name, m in maps.items():
        at = (0, 0, int(targets.cell[0]) // w, int(targets.cell[0]) % w)
        values = []
        for step in (1e-2, -1e-2):
            moved = {k: v.detach().clone() for k, v in maps.items()}
            moved[name][at] += step
            values.append(detection_loss(moved, batch)[0].item())
        assert m.grad[at].item() == pytest.approx((values[0] - values[1]) / 2e-2, abs=5e-3)
    assert maps["box"].grad.ne(0).sum() <= 4 * len(targets.cell)


FAMILIES = list_backbones(trial=True)["name"].tolist()


@pytest.mark.parametrize("name", [*FAMILIES, "dla34"])
def test_every_family_is_a_trunk(name):
    "Maps at a quarter of the size; a gradient for each parameter that is trained, which several processes wait for."
    torch.manual_seed(0)
    net = PointID(name, channels=8, dim=6, size=SIZE)
    x = torch.randn(2, 3, *SIZE)
    maps = net(x)
    assert {k: tuple(m.shape) for k, m in maps.items()} == dict(
        heat=(2, 1, 24, 40), box=(2, 4, 24, 40), offset=(2, 2, 24, 40), embedding=(2, 6, 24, 40))
    sum(m.square().sum() for m in maps.values()).backward()
    assert not [k for k, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert sum(p.requires_grad for p in net.trunk.parameters()) > 5


def test_a_side_that_32_does_not_divide_is_padded(net):
    torch.manual_seed(1)
    x = torch.randn(1, 3, 100, 130)
    with torch.no_grad(): maps, whole = net(x), net(F.pad(x, (0, 30, 0, 28)))
    assert padded((100, 130)) == (128, 160) and maps["heat"].shape[-2:] == (25, 33)
    for name in maps: torch.testing.assert_close(maps[name], whole[name][..., :25, :33])


def test_given_boxes_and_found_ones_have_the_same_feature(net):
    frame = np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)
    detector = PointDetector(net, min_score=0., k=3)
    (boxes, scores, x), = detector.detect([frame])
    assert (np.diff(scores) <= 0).all()
    pixels = (torch.from_numpy(frame[..., ::-1].copy()).permute(2, 0, 1).float() / 255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (net.input.mean, net.input.std))
    with torch.no_grad(): maps = net(((pixels - mean) / std)[None])
    found, _, _ = decode(maps, 0., 3)[0]
    middles = ((found[:, :2] + found[:, 2:]) / 2).numpy()
    given = np.hstack([middles - 2, np.full((3, 2), 4.)])
    if ((middles >= 0) & (middles < [160, 96])).all():
        got = net.embed_boxes(((pixels - mean) / std)[None], [given])[0]
        cells = (middles // 4).astype(int)
        want = F.normalize(maps["embedding"][0][:, cells[:, 1], cells[:, 0]].T, dim=1)
        torch.testing.assert_close(got, want)


def test_a_detector_takes_frames_of_several_sizes(net):
    "A frame twice as large gives boxes twice as large; alone or together, the same."
    g = np.random.default_rng(2)
    small = np.kron(g.integers(0, 256, (12, 20, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    large = np.kron(small, np.ones((2, 2, 1), np.uint8))
    detector = PointDetector(net, min_score=0., k=4)
    both, alone = detector.detect([small, large, small]), detector.detect([large])
    for one, two in zip(both[1], alone[0]): np.testing.assert_allclose(one, two, atol=1e-4)
    for one, two in zip(both[0], both[2]): np.testing.assert_allclose(one, two, atol=1e-4)
    np.testing.assert_allclose(both[1][0], 2 * both[0][0], atol=1e-2)
    np.testing.assert_allclose(both[1][2], both[0][2], atol=1e-4)


def test_a_network_comes_back_as_it_was(net, tmp_path):
    save_pointid(net, tmp_path, scores=dict(AP=.5))
    again = load_pointid(tmp_path)
    assert again.card["scores"] == dict(AP=.5) and again.settings == net.settings and again.input == net.input
    for (k, a), (_, b) in zip(net.state_dict().items(), again.state_dict().items()): assert torch.equal(a, b), k
    (tmp_path / "pointid.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match="lacks input"): load_pointid(tmp_path)
    (tmp_path / "pointid.json").unlink()
    with pytest.raises(FileNotFoundError, match="pointid.json"): load_pointid(tmp_path)


def test_a_trunk_takes_the_weights_of_a_backbone(tmp_path):
    from cion_nb.models.backbones import create_backbone, save_backbone
    backbone = create_backbone("resnet10_tiny_ibn", SIZE)
    save_backbone(backbone, tmp_path / "backbone.safetensors")
    net = PointID("resnet10_tiny_ibn", channels=8, dim=6, size=SIZE, weights=tmp_path / "backbone.safetensors")
    ours = net.trunk.net.state_dict()
    assert len(ours) > 10 and all(torch.equal(x, ours[k]) for k, x in backbone.state_dict().items())


def test_refusals(net):
    for box, said in (([10, 10, 0, 5], "frame 0, boxes 0"), ([-30, 10, 20, 5], "frame 0, boxes 0")):
        with pytest.raises(ValueError, match=said): net.embed_boxes(torch.zeros(1, 3, *SIZE), [np.array([box])])
    with pytest.raises(ValueError, match="not finite"): encode(np.array([[0, 0, np.inf, 1]]), SIZE)
    with pytest.raises(ValueError, match="32x160|at least|cannot take"): Trunk("vit_trial", (30, 50))
    assert OVERLAP == .7


def test_heads_at_middles_alone_say_and_learn_the_same(net):
    "Also in corners, beside padding, and where two middles are neighbours."
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 40, 72, generator=g)                             # padded inside
    image, cell = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 10 * 18 - 1, 17, 9 * 18])
    whole, there = net(x), net(x, (image, cell))
    weights, grads = [p for p in net.parameters() if p.requires_grad], []
    for maps in (whole, there):
        loss = sum((at_cells(maps[name], image, cell)**2).sum() for name in ("box", "offset", "embedding"))
        grads.append(torch.autograd.grad(loss + maps["heat"].mean(), weights, allow_unused=True))
    for name in ("box", "offset", "embedding"):
        torch.testing.assert_close(there[name], at_cells(whole[name], image, cell), rtol=1e-4, atol=1e-5)
    for one, other in zip(*grads):
        if one is not None: torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there["heat"], whole["heat"])


def test_a_lower_overlap_makes_wider_bells():
    box = np.array([[40, 20, 17, 38.]])
    wide, narrow = (int((encode(box, SIZE, overlap=o).heat > .1).sum()) for o in (.3, .7))
    assert wide > narrow


@pytest.mark.parametrize("size", [(64, 96), (70, 90)])               # the second is padded inside
def test_people_are_the_same_from_heads_at_the_peaks_alone(size):
    torch.manual_seed(0)
    net = PointID("resnet10_tiny_ibn", 8, 16, size=size).eval()
    x = torch.randn(3, 3, *size)
    with torch.inference_mode():
        whole, there = net(x), net(x, lambda heat: peaks(heat, .05, 20)[:2])
        assert there["box"].ndim == 2 and len(there["box"]) < whole["box"][:, 0].numel() / 4
        for want, found in zip(decode(whole, .05, 20), decode(there, .05, 20), strict=True):
            assert 3 < len(want[0]) <= 20
            for a, b in zip(want, found): torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)

"""Views as papers and released code draw them, by their distributions, and what a batch of views promises."""
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from examples import picture
from oracles import BOX, boxes_plainly, same_distribution
from scipy import stats

from cion_nb.models.architectures import InputSpec
from cion_nb.training import views
from cion_nb.training.views import (
    erase_,
    erase_boxes,
    MultiCrop,
    normalise,
    resize,
    sample_draws,
    TrainTransform,
    VIEW_RECIPES,
)

torch.set_num_threads(1)

tv = pytest.importorskip("torchvision.transforms.functional")
T = pytest.importorskip("torchvision.transforms")


def test_erasing_boxes_are_distributed_as_timms():
    erasing = pytest.importorskip("timm.data.random_erasing")
    import random
    random.seed(0)
    n, boxes = 3000, []
    eraser = erasing.RandomErasing(probability=1., mode="const", max_count=1, device="cpu")
    for _ in range(n):
        x = torch.ones(3, 64, 32)
        eraser(x)
        gone = (x[0] == 0).nonzero()
        boxes.append((gone.max(0).values - gone.min(0).values + 1).tolist() if len(gone) else [0, 0])
    theirs, ours = np.array(boxes), erase_boxes(sample_draws(0, 0, np.arange(n), 22), np.ones(n, bool), (64, 32))
    assert ((ours[:, :2] >= 0) & (ours[:, :2] + ours[:, 2:] <= [64, 32])).all()
    for column in (lambda b: b[:, 0] * b[:, 1], lambda b: b[:, 0] / np.maximum(b[:, 1], 1)):
        assert stats.ks_2samp(column(theirs), column(ours[:, 2:])).pvalue > 1e-3
    assert not erase_boxes(sample_draws(0, 0, np.arange(9), 22), np.zeros(9, bool), (64, 32)).any()


# ── every augmentation that a paper's or released recipe names, by its distribution: the numbers are typed from the
# released code, not read from ours ──
@pytest.mark.parametrize("size, area", [((256, 128), (.02, .4)), ((384, 128), (.02, .4)), ((256, 128), (.02, .6)),
                                        ((64, 32), (.02, .4))], ids=["usl", "mgn", "lup", "small"])
def test_released_erasing_boxes(size, area):
    n = 6000
    theirs = boxes_plainly(n, *size, area, (.3, 1 / .3))
    u = sample_draws(3, 0, np.arange(n), 22)
    ours = erase_boxes(u, np.ones(n, bool), size, "zhong", area)
    same_distribution(ours, theirs, *BOX)
    assert (ours[:, 2] > 0).all(), "ten tries are as good as a hundred"
    if size == (256, 128) and area[1] == .4:
        share = lambda b: b[:, 2] * b[:, 3] / (256 * 128)
        timms = erase_boxes(u, np.ones(n, bool), size)
        assert share(ours).mean() == pytest.approx(.204, abs=.006)
        assert (share(ours) > 1/3).mean() == pytest.approx(.158, abs=.02)
        assert share(timms).mean() == pytest.approx(.165, abs=.006) and (share(timms) > 1/3).mean() < .005
        assert any(stats.ks_2samp(c(timms.astype(float)), c(theirs.astype(float))).pvalue < 1e-9 for c in BOX), (
            "this test can fail")
    with pytest.raises(KeyError): erase_boxes(u, np.ones(n, bool), size, "zhang")


# recipe: (global area, local area, w/h), interpolation, jitter, blur and solarise of first global, other global,
# local view, erasing
# LUP's 'ori-cj+sre'
VIEWS = {
    # DINO's main_dino.py, w/h times 1/2
    "paper": ((.4, 1.), (.05, .4), (.375, .667), "bicubic", .8, (1., .1, .5), (0., .2, 0.), None),
    # CION's data/aug.py and run.py
    "released": ((.8, 1.), (.05, .8), (.4, .6), "bicubic", .8, (1., .1, .5), (0., .2, 0.), None),
    "lup": ((.2, 1.), None, (.75, 4/3), "bilinear", 0., (.5, .5, None), (0., 0., None), (.5, (.02, .6)))}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_drawn_as_released(name):
    whole, local, ratio, interpolation, jitter, blur, solarise, erasing = VIEWS[name]
    n, H, W = 2000, 160, 70
    crop = MultiCrop((256, 128), (128, 64), recipe=name, seed=2)
    p = crop.parameters(np.arange(n), np.full(n, H), np.full(n, W))
    kinds = [(0, whole, 0), (1, whole, 1)] + ([(5, local, 2)] if local else [])
    near = lambda found, chance: abs(found.mean() - chance) <= 4 * np.sqrt(chance * (1 - chance) / found.size) + 1e-12
    torch.manual_seed(1)
    image = torch.empty(3, H, W)
    for v, scale, kind in kinds:
        same_distribution(p.crop[v], np.array([T.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)]),
                          lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3],
                          lambda b: b[:, 3] / b[:, 2])
        assert near(p.flip[v], .5) and near(p.grey[v], .2) and near(p.jitter[v], jitter)
        assert near(p.sigma[v] > 0, blur[kind]) and near(p.solarise[v], solarise[kind])
        if blur[kind] >= .5: assert stats.kstest(p.sigma[v][p.sigma[v] > 0], stats.uniform(.1, 1.9).cdf).pvalue > 1e-3
        for k, (centre, strength) in enumerate(((1, .4), (1, .4), (1, .2), (0, .1))):
            assert stats.kstest(p.factors[v, :, k], stats.uniform(centre - strength, 2 * strength).cdf).pvalue > 1e-3
        assert stats.chisquare(np.bincount(p.order[v], minlength=24)).pvalue > 1e-3
        drawn = p.erase[v][p.erase[v, :, 2] > 0]
        assert near(p.erase[v, :, 2] > 0, erasing[0]) if erasing else not len(drawn)
        if erasing: same_distribution(drawn, boxes_plainly(len(drawn), 256, 128, erasing[1], (.3, 1 / .3)), *BOX)
    assert crop.recipe["interpolation"] == interpolation and crop.n_views == (10 if local else 2)


def test_flips_and_offsets_of_the_training_transform():
    """Read off pixels that know their place: flip .5, then a crop at a uniform offset of 0 to 2 pad, of an image with
    black around it.
    """
    n, h, w, pad = 6000, 40, 32, 10
    place = torch.stack([torch.arange(1, h + 1)[:, None].expand(h, w), torch.arange(1, w + 1).expand(h, w),
                         torch.full((h, w), 9)]).to(torch.uint8)
    x, boxes, _ = TrainTransform((h, w), pad=pad, seed=4, rule="zhong")(place.expand(n, 3, h, w), np.arange(n))
    row, column, right = (x[:, c, h // 2, w // 2 + k].numpy().astype(int) for c, k in ((0, 0), (1, 0), (1, 1)))
    flipped = right < column
    top, left = row - 1 + pad - h // 2, np.where(flipped, w - column, column - 1) + pad - w // 2
    assert abs(flipped.mean() - .5) < 4 * .5 / n ** .5
    for offset in (top, left):
        assert (offset.min(), offset.max()) == (0, 2 * pad) and stats.chisquare(np.bincount(offset)).pvalue > 1e-3
    assert abs(np.corrcoef(top, left)[0, 1]) < .06 and abs(np.corrcoef(top, flipped)[0, 1]) < .06
    black = (x == 0).all(1)
    assert torch.equal(black.sum((1, 2)), torch.from_numpy(h * w - (h - abs(top - pad)) * (w - abs(left - pad))))
    drawn = boxes.numpy()[boxes[:, 2] > 0]
    assert abs(len(drawn) / n - .5) < 4 * .5 / n ** .5
    same_distribution(drawn, boxes_plainly(len(drawn), h, w, (.02, .4), (.3, 1 / .3)), *BOX)
    with pytest.raises(ValueError, match="erasing rule 'tim'"): TrainTransform(rule="tim")


def test_embedded_rows_are_resized_as_the_models_input_says():
    class Pixels(torch.nn.Module):
        embed_dim = 3 * 16 * 8
        def __init__(self, interpolation):
            super().__init__()
            self.input, self.w = InputSpec(16, 8, interpolation=interpolation, mean=(0, 0, 0),
                                           std=(1, 1, 1)), torch.nn.Parameter(torch.ones(1))
        def forward(self, x): return x.flatten(1)
    images = [picture(9, 7, s) for s in range(3)]
    class Store:
        def __getitem__(self, rows): return [images[r] for r in rows]
    for interpolation in ("bilinear", "bicubic"):
        found = views.embed_rows(Pixels(interpolation), Store(), np.arange(3), (16, 8))
        np.testing.assert_allclose(found, resize(images, (16, 8), interpolation).flatten(1) / 255, atol=1e-6)


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
def test_views_do_not_depend_on_the_batch(recipe):
    crop = MultiCrop((32, 16), (16, 8), recipe=recipe, seed=5)
    images, index = [picture(48 + s, 24 + s % 5, s) for s in range(12)], np.arange(12) * 17
    together = crop(images, index, epoch=3)
    assert len(together) == crop.n_views == (2 if recipe == "lup" else 10)
    assert all(v.dtype == torch.uint8 for v in together)
    for parts in (np.arange(12)[:, None], np.array_split(np.random.default_rng(0).permutation(12), 3)):
        for part in parts:
            apart = crop([images[k] for k in part], index[part], epoch=3)
            assert all(torch.equal(a, v[torch.from_numpy(part)]) for a, v in zip(apart, together))
    again = pickle.loads(pickle.dumps(crop))(images, index, epoch=3)
    assert all(map(torch.equal, again, together))
    # one object, several threads at once
    with ThreadPoolExecutor(4) as pool:
        for views_ in pool.map(lambda _: crop(images, index, epoch=3), range(8)):
            assert all(map(torch.equal, views_, together))
    planar = crop([i.contiguous() for i in images], index, epoch=3)
    assert all(map(torch.equal, planar, together))  # no matter how an image lies in memory
    assert not any(map(torch.equal, crop(images, index, epoch=4), together))
    assert not any(map(torch.equal, MultiCrop((32, 16), (16, 8), recipe=recipe, seed=6)(images, index, epoch=3),
                       together))


def test_stacked_images_and_odd_numbers_of_views():
    stack = torch.stack([picture(32, 16, s) for s in range(3)])
    for n_global, n_local in ((1, 0), (1, 3), (3, 0), (2, 1)):
        views = MultiCrop((32, 16), (16, 8), n_local=n_local, n_global=n_global)(stack, [0, 1, 2])
        assert [tuple(v.shape) for v in views] == [(3, 3, 32, 16)] * n_global + [(3, 3, 16, 8)] * n_local
    with pytest.raises(ValueError, match="3 images but 2"): MultiCrop((32, 16))(stack, [0, 1])
    a, b = MultiCrop((32, 16), n_local=0)(stack, [0, 1, 2]), MultiCrop((32, 16), n_local=0)(list(stack), [0, 1, 2])
    assert all(map(torch.equal, a, b))
    assert MultiCrop((32, 16), (16, 8), n_local=1)([], np.zeros(0, int))[0].shape == (0, 3, 32, 16)


def test_lup_erases_with_the_mean_colour_and_keeps_the_rest():
    images, index = [picture(64, 32, s) for s in range(40)], np.arange(40)
    with_, without = (MultiCrop((64, 32), recipe="lup", erase=e) for e in (.5, 0.))
    views, plain, p = with_(images, index), without(images,
                                                    index), with_.parameters(index, np.full(40, 64), np.full(40, 32))
    assert .2 < (p.erase[..., 2] > 0).mean() < .8
    for v in range(2):
        for b, (t, l, h, w) in enumerate(p.erase[v].tolist()):
            inside = torch.zeros(64, 32, dtype=bool)
            inside[t:t + h, l:l + w] = True
            assert (views[v][b][:, inside].T == torch.tensor([124, 116, 104])).all()
            assert torch.equal(views[v][b][:, ~inside], plain[v][b][:, ~inside])


@pytest.mark.parametrize("settings_, says", [
    (dict(recipe="dino"), "use one of"), (dict(colour=1), "no setting colour"), (dict(n_global=0), "at least one"),
    (dict(n_local=-1), "n_local"),
    (dict(global_scale=(.5, 1.5)), "global_scale"), (dict(local_scale=(.5, .4)), "local_scale"),
    (dict(ratio=(0, 1)), "ratio"),
    (dict(strength=(.4, .4, .2, .6)), "hue"), (dict(blur=(2, 0, 0)), "chances"), (dict(flip=-.1), "chances"),
    (dict(blur_sigma=(0, 1)), "blur_sigma")])
def test_wrong_view_settings(settings_, says):
    with pytest.raises(ValueError, match=says): MultiCrop(**settings_)


def test_views_do_not_depend_on_torchs_threads():
    images, crop, n = ([picture(90, 48, s) for s in range(4)], MultiCrop((128, 64), (64, 32), n_local=2),
                       torch.get_num_threads())
    one = crop(images, np.arange(4))
    try:
        torch.set_num_threads(2)
        two = crop(images, np.arange(4))
    finally: torch.set_num_threads(n)
    assert all(map(torch.equal, one, two))


def test_draws():
    u = sample_draws(7, 2, np.arange(500), 20)
    assert u.shape == (500, 20) and (u >= 0).all() and (u < 1).all() and len(np.unique(u)) == u.size
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    # a longer stream only adds
    assert np.array_equal(u[3:5, :9], sample_draws(7, 2, np.arange(3, 5), 9))
    assert np.array_equal(sample_draws(7, 2, np.array([4, 4, 4]), 3)[0], u[4, :3])
    assert len(np.unique(sample_draws(7, 2, np.array([4, 4, 4]), 3))) == 9
    assert sample_draws(0, 0, np.zeros(0, int), 4).shape == (0, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_draws(2**40, 10**9, np.array([2**40]), 3)
        sample_draws(-1, -1, np.array([0]), 3)


def test_train_transform_is_resize_flip_pad_crop():
    images, index = [picture(70 + s, 40, s) for s in range(30)], np.arange(30)
    x, boxes, seeds = TrainTransform((64, 32), pad=4, seed=1)(images, index, epoch=2)
    u, flips, corners = sample_draws(1, 2, index, 26), [], []
    for k, image in enumerate(images):
        plain = resize(image[None], (64, 32), "bicubic")[0]
        assert ((plain.int() - tv.resize(image, [64, 32], T.InterpolationMode.BICUBIC, antialias=True).int()).abs()
                <= 1).float().mean() > .98
        plain = tv.hflip(plain) if u[k, 0] < .5 else plain
        top, left = (int(v * 9) for v in u[k, 1:3])
        assert torch.equal(x[k], tv.crop(tv.pad(plain, 4), top, left, 64, 32))
        flips.append(u[k, 0] < .5)
        corners.append((top, left))
    assert 5 < sum(flips) < 25 and {c[0] for c in corners} >= {0, 8} and len(set(seeds.tolist())) == 30
    half = TrainTransform((64, 32), pad=4, seed=1)(images[10:20], index[10:20], epoch=2)
    assert torch.equal(half[0], x[10:20]) and torch.equal(half[1], boxes[10:20])
    spec = InputSpec(mean=(.5,) * 3, std=(.5,) * 3)
    z = normalise(x, spec)
    noise, mean = erase_(z.clone(), boxes, seeds), erase_(z.clone(), boxes, seeds, mode="const")
    assert torch.equal(noise, erase_(z.clone(), boxes, seeds))
    inside = torch.zeros(30, 64, 32, dtype=bool)
    for m, (t, l, h, w) in zip(inside, boxes.tolist()): m[t:t + h, l:l + w] = True
    inside = inside[:, None].expand_as(z)
    assert torch.equal(noise[~inside], z[~inside]) and not mean[inside].any()
    assert stats.kstest(noise[inside][::7].numpy(), "norm").pvalue > 1e-4
    plain = TrainTransform((64, 32), flip=0, pad=0, erase=0)(images, index)
    assert torch.equal(plain[0], resize(images, (64, 32), "bicubic")) and not plain[1].any()
    with pytest.raises(ValueError, match="mode 'rand'"): erase_(z, boxes, seeds, "rand")
    with pytest.raises(ValueError, match="chances"): TrainTransform(flip=2)
    with pytest.raises(ValueError, match="pad"): TrainTransform(pad=-1)
    with pytest.raises(ValueError, match="size=64: two numbers"): TrainTransform(64)
    with pytest.raises(ValueError, match="height must be .* of pixels.* got 0"): TrainTransform((0, 1))
    with pytest.raises(ValueError, match="interpolation='area'"): TrainTransform(interpolation="area")
    with pytest.raises(ValueError, match="interpolation='area'"): resize(images, (8, 4), "area")
    with pytest.raises(ValueError, match="sample numbers"): TrainTransform((64, 32))(images, [0])


def test_normalise_is_feature_extractions():
    from cion_nb.models.features import normalise as theirs
    x = torch.stack([picture(16, 8, s) for s in range(3)])
    for spec in (InputSpec(), InputSpec(colour="BGR", scale=1., mean=(1., 2., 3.), std=(4., 5., 6.))):
        assert torch.equal(normalise(x, spec), theirs(x.permute(0, 2, 3, 1), spec))
        assert [v.shape for v in normalise([x, x[:1]], spec)] == [(3, 3, 16, 8), (1, 3, 16, 8)]

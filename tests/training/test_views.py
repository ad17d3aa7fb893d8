"""Views against torchvision, parameter by parameter and in distribution."""
import numpy as np
import pytest
import torch
from examples import picture
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFilter, ImageOps
from scipy import stats

from cion_nb.training import views
from cion_nb.training.views import (
    blur,
    brighten_,
    contrast_,
    crop_boxes,
    grey_,
    grey_sum,
    MultiCrop,
    ORDERS,
    sample_draws,
    saturate_,
    turn_hue_,
    VIEW_RECIPES,
)

torch.set_num_threads(1)

tv = pytest.importorskip("torchvision.transforms.functional")
T = pytest.importorskip("torchvision.transforms")
v2 = pytest.importorskip("torchvision.transforms.v2.functional")
COLOURS = torch.tensor([[r, g, b] for r in (0, 1, 127, 254, 255) for g in (0, 1, 127, 254, 255)
                        for b in (0, 1, 127, 254, 255)], dtype=torch.uint8).T.reshape(3, 5, 25)
PICTURES = [picture(), COLOURS, torch.full((3, 8, 6), 255, dtype=torch.uint8),
            torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)]


def planes(image, op, *values):
    "A colour operation on a copy of a (3, h, w) image."
    x = image.float().contiguous().numpy().copy()
    op(*x.reshape(3, -1), *(np.float32(v) for v in values))
    return torch.from_numpy(x)


def blurred(image, sigma):
    x = image.float().contiguous().numpy()
    out = np.empty_like(x)
    for plane, to in zip(x, out): blur(plane, sigma, to)
    return torch.from_numpy(out)


def mean_grey(image): return grey_sum(*image.float().contiguous().numpy().reshape(3, -1)) / image[0].numel()


OPS = {"brightness": (lambda x, f: planes(x, brighten_, f), tv.adjust_brightness, (0, .6, 1, 1.4, 2)),
       "contrast": (lambda x, f: planes(x, contrast_, f, mean_grey(x)), tv.adjust_contrast, (0, .6, 1, 1.4, 2)),
       "saturation": (lambda x, f: planes(x, saturate_, f), tv.adjust_saturation, (0, .8, 1, 1.2, 2)),
       "hue": (lambda x, f: planes(x, turn_hue_, f), tv.adjust_hue, (-.5, -.3, -.1, -.01, 0, .05, .1, .25, .5))}


@pytest.mark.parametrize("name", OPS)
def test_colour_operations_equal_torchvisions(name):
    ours, theirs, factors = OPS[name]
    for image in PICTURES:
        for f in factors:
            out = ours(image, f)
            # float: nothing is rounded
            assert (out - theirs(image / 255, f) * 255).abs().max() < .02, (name, f)
            # uint8: torchvision cuts the fraction, and the grey's
            assert (out - theirs(image, f).float()).abs().max() < 1.01 + abs(1 - f), (name, f)
            # PIL's hue is quantised to 256 steps
            if name != "hue":
                pil = torch.from_numpy(
                    np.array(theirs(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), f))).permute(2, 0, 1)
                assert (out - pil.float()).abs().max() < 2.01 + abs(1 - f), (name, f)
            else:
                pil = torch.from_numpy(np.array(theirs(Image.fromarray(picture().permute(1, 2, 0).contiguous().numpy()),
                                                       f))).permute(2, 0, 1)
                assert (ours(picture(), f) - pil.float()).abs().mean() < 2.5


@settings(max_examples=25, deadline=None)
@given(f=st.floats(0, 2), turn=st.floats(-.5, .5), seed=st.integers(0, 99))
def test_any_factor(f, turn, seed):
    image = picture(12, 9, seed, noise=60)
    for name, (ours, theirs, _) in OPS.items():
        v = turn if name == "hue" else f
        assert (ours(image, v) - theirs(image / 255, v) * 255).abs().max() < .02, name


def test_grey_and_flip_are_exact_and_solarise_is_pils():
    for image in PICTURES:
        assert (planes(image, grey_) - tv.rgb_to_grayscale(image / 255) * 255).abs().max() < 1e-3
        assert (planes(image, grey_) - tv.rgb_to_grayscale(image).float()).abs().max() < 1
        for solarise, flip in ((False, False), (True, False), (False, True), (True, True)):
            out = np.empty(image.shape, np.uint8)
            views._finish(image.float().contiguous().numpy(), out, np.empty(image.shape[1:], np.float32), 0., solarise,
                          flip)
            pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            theirs = torch.from_numpy(np.array(ImageOps.solarize(pil) if solarise else pil)).permute(2, 0, 1)
            assert torch.equal(theirs, tv.solarize(image, 128) if solarise else image)
            assert torch.equal(torch.from_numpy(out), theirs.flip(-1) if flip else theirs)


@pytest.mark.parametrize("sigma", [.1, .3, .5, 1., 1.3, 2.])
def test_blur_equals_torchvisions_and_is_near_pils(sigma):
    for image in (picture(), picture(128, 64, 3), PICTURES[3]):
        out = blurred(image, sigma)
        kernel = 2 * int(np.ceil(3 * sigma)) + 1
        assert (out - tv.gaussian_blur(image / 255, kernel, sigma) * 255).abs().max() < .01
        assert (out - tv.gaussian_blur(image, kernel, sigma).float()).abs().max() <= .51
    # PIL approximates the Gaussian by box filters and repeats the edge pixels
    image = picture(128, 64, 3)
    pil = np.array(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).filter(
        ImageFilter.GaussianBlur(sigma))).transpose(2, 0, 1)
    assert np.abs(blurred(image, sigma).numpy() - pil)[:, 8:-8, 8:-8].mean() < (.6 if sigma >= 1 else 1.5)


def test_blur_of_small_and_of_flat_images():
    "The kernel is cut to the image: torchvision cannot reflect further than that either, and takes the same kernel."
    for h, w in ((4, 3), (2, 9), (1, 5), (1, 1), (3, 40)):
        image = torch.rand(3, h, w, generator=torch.Generator().manual_seed(0)) * 255
        reach = min(h - 1, w - 1, 6)
        assert (blurred(image, 2.) - tv.gaussian_blur(image, 2 * reach + 1, 2.)).abs().max() < 1e-3
    flat = torch.full((3, 32, 16), 77.)
    assert torch.allclose(blurred(flat, 1.7), flat, atol=1e-3)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_equal_torchvisions(interpolation):
    crop, mode = MultiCrop((64, 32), (32, 16), n_local=4, jitter=0, grey=0, blur=(0, 0, 0), solarise=(0, 0, 0),
                           interpolation=interpolation), getattr(T.InterpolationMode, interpolation.upper())
    images = [picture(128, 64, s) for s in range(3)] + [picture(90, 50, 9), picture(40, 60, 8)]
    views, p = crop(images, np.arange(5)), crop.parameters(np.arange(5), [128, 128, 128, 90, 40], [64, 64, 64, 50, 60])
    for v, stack in enumerate(views):
        for b, image in enumerate(images):
            box, size = p.crop[v, b].tolist(), [64, 32] if v < 2 else [32, 16]
            ours = (stack[b].flip(-1) if p.flip[v, b] else stack[b]).int()
            # torchvision v2 on uint8: to the bit
            assert torch.equal(ours, v2.resized_crop(image, *box, size, mode, antialias=True).int())
            pil = tv.resized_crop(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), *box, size, mode)
            for theirs in (tv.resized_crop(image, *box, size, mode, antialias=True),
                           torch.from_numpy(np.array(pil)).permute(2, 0, 1)):
                # bicubic overshoots: each clips it at another stage, next to black and white
                off = (ours - theirs.int()).abs()
                assert (off <= 1).float().mean() > .98 and off.max() <= (1 if interpolation == "bilinear" else 8)
                assert (ours - theirs.int()).float().mean().abs() < .1


@pytest.mark.parametrize("size, recipe",
                         [((48, 24), {}), ((7, 3), {}), ((48, 24), dict(jitter=0.)),
                          ((48, 24), dict(jitter=1., grey=0., blur=(0, 0, 0)))])
def test_a_whole_view_equals_the_same_steps_of_torchvision(size, recipe):
    """Cut by torchvision v2 on uint8, then every operation on floats, in the order drawn; we round once more, at the
    end.
    """
    # 64x32 is two pieces, 48x24 one and a bit, 7x3 less than the blur
    crop = MultiCrop((64, 32), size, n_local=6, **recipe)
    images, index = [picture(128, 64, s) for s in range(24)], np.arange(100, 124)
    views, p = crop(images, index), crop.parameters(index, np.full(24, 128), np.full(24, 64))
    seen, worst = set(), []
    for v, stack in enumerate(views):
        for b in range(24):
            x = v2.resized_crop(images[b], *p.crop[v, b].tolist(), list(stack.shape[-2:]), T.InterpolationMode.BICUBIC,
                                antialias=True) / 255
            if p.flip[v, b]: x = tv.hflip(x)
            if p.jitter[v, b]:
                for op in ORDERS[p.order[v, b]]: x = list(OPS.values())[op][1](x, float(p.factors[v, b, op]))
                seen.add(int(p.order[v, b]))
            if p.grey[v, b]: x = tv.rgb_to_grayscale(x, 3)
            if p.sigma[v, b] > 0:
                x = tv.gaussian_blur(x, 2 * min(int(np.ceil(3 * p.sigma[v, b])), *(n - 1 for n in stack.shape[-2:]))
                                     + 1, float(p.sigma[v, b]))
            if p.solarise[v, b]: x = torch.where(x > .5, 1 - x, x)
            worst.append((stack[b] - x * 255).abs().max().item())
    assert max(worst) < .56                                 # one rounding
    assert len(seen) == (0 if recipe.get("jitter") == 0 else 24)         # every order of the four colour operations
    happens = [p.flip, p.grey, p.sigma > 0, p.solarise, p.jitter] if not recipe else []
    assert all(0 < h.mean() < 1 for h in happens)


def test_parameters_are_distributed_as_torchvisions():
    n = 4000
    for H, W, scale, ratio in ((256, 128, (.4, 1.), (.375, .667)), (256, 128, (.05, .4), (.375, .667)),
                               (256, 128, (.2, 1.), (.75, 4/3)), (128, 64, (.8, 1.), (.4, .6))):
        torch.manual_seed(0)
        image = torch.empty(3, H, W)
        theirs = np.array([T.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
        ours = crop_boxes(sample_draws(1, 0, np.arange(n), 22), np.full(n, H), np.full(n, W), scale, ratio)
        for column in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
            assert stats.ks_2samp(column(theirs.astype(float)), column(ours.astype(float))).pvalue > 1e-3
    p = MultiCrop(seed=3).parameters(np.arange(n), np.full(n, 256), np.full(n, 128))
    share = lambda a, chance: abs(a.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / a.size) + 1e-12
    assert share(p.flip, .5) and share(p.jitter, .8) and share(p.grey, .2)
    assert share(p.sigma[0] > 0, 1.) and share(p.sigma[1] > 0, .1) and share(p.sigma[2:] > 0, .5)
    assert share(p.solarise[1], .2) and not p.solarise[[0, *range(2, 10)]].any() and not p.erase[..., 2].any()
    assert stats.kstest(p.sigma[p.sigma > 0], stats.uniform(.1, 1.9).cdf).pvalue > 1e-3
    for k, (low, width) in enumerate(((.6, .8), (.6, .8), (.8, .4), (-.1, .2))):
        assert stats.kstest(p.factors[..., k].ravel(), stats.uniform(low, width).cdf).pvalue > 1e-3
    assert stats.chisquare(np.bincount(p.order.ravel(), minlength=24)).pvalue > 1e-3
    assert abs(np.corrcoef(p.factors[..., 0].ravel(), p.factors[..., 1].ravel())[0, 1]) < .02
    assert abs(np.corrcoef(p.flip[0], p.flip[1])[0, 1]) < .08


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_views_are_distributed_as_those_of_the_pil_pipeline(kind):
    """What the networks see, whole: light, colour, contrast and sharpness of views of one picture from either pipeline.
    Kinds: first, second global, local.
    """
    import random

    from PIL import ImageFilter
    random.seed(kind)
    torch.manual_seed(kind)
    n, r, size = 600, VIEW_RECIPES["paper"], (64, 32)
    solarise, sigma = r["solarise"][kind], lambda: random.uniform(*r["blur_sigma"])
    chain = T.Compose([
        T.RandomResizedCrop(size, r["local_scale" if kind == 2 else "global_scale"], r["ratio"],
                            interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(*r["strength"])], r["jitter"]),
        T.RandomGrayscale(r["grey"]),
        lambda i: i.filter(ImageFilter.GaussianBlur(sigma())) if random.random() < r["blur"][kind] else i,
        lambda i: ImageOps.solarize(i) if random.random() < solarise else i, T.PILToTensor()])
    image = picture(128, 64, 5, noise=6)
    pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    theirs = torch.stack([chain(pil) for _ in range(n)]).float()
    ours = MultiCrop(size, size, n_local=1, seed=kind)(image.expand(n, 3, 128, 64), np.arange(n))[kind].float()
    for name, of in dict(light=lambda x: x.mean((1, 2, 3)), red=lambda x: x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2)),
                         contrast=lambda x: x.std((1, 2, 3)),
                         side=lambda x: x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3)),
                         sharpness=lambda x: x.diff(dim=3).abs().mean((1, 2, 3))).items():
        assert stats.ks_2samp(of(theirs).numpy(), of(ours).numpy()).pvalue > 1e-3, name

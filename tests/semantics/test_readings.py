"""Readings of a trained network: backgrounds, attention against loops, and what each question needs."""
import numpy as np
import pandas as pd
import pytest
import torch

from cion_nb.core.images import open_image
from cion_nb.models.backbones import create_backbone
from cion_nb.semantics import readings as R
from cion_nb.semantics.local_semantics import CONTROLS, part_boxes, Strips, to_labels, WorldParts
from cion_nb.semantics.vills import add_part_tokens, VillsNet
from cion_nb.video.resampler import Resampler


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    backbone = add_part_tokens(create_backbone("vit_trial", (64, 32)))
    resampler = Resampler(96, latents=6, heads=3, dim_head=32, frames=4)
    return VillsNet(backbone, resampler, frames=4, frame_size=(30, 24)).eval()


def test_a_person_keeps_its_pixels_before_another_street():
    rng = np.random.default_rng(0)
    images, person = rng.integers(0, 256, (4, 8, 6, 3), np.uint8), rng.random((4, 8, 6)) < .4
    out = R.before_another(images, person, np.array([1, 2, 3, 0]))
    assert (out[person] == images[person]).all()
    for i, j in enumerate((1, 2, 3, 0)):
        places = np.argwhere(~person[j])
        for y, x in np.argwhere(~person[i]):                         # by loops: the pixel itself, or one as near as any
            away = ((places - (y, x))**2).sum(1)
            nearest = {tuple(images[j][tuple(p)]) for p in places[away == away.min()]}
            assert tuple(out[i, y, x]) in nearest
    whole = np.ones((4, 8, 6), bool)
    assert (R.before_another(images, whole & (np.arange(4) == 0)[:, None, None], np.array([0, 0, 0, 0]))[1]
            == images[0]).all()                                      # a donor that is all person gives itself


def test_donors_are_of_another_camera():
    samples = pd.DataFrame(dict(camid=np.random.default_rng(1).integers(0, 3, 200)))
    found, camid = R.donors(samples), samples["camid"].to_numpy()
    assert (camid[found] != camid).all() and (R.donors(samples) == found).all()
    assert len(set(found)) > 60 and (R.donors(samples, seed=1) != found).any()


def test_attention_of_tokens_is_what_the_last_block_weighs_by(net):
    backbone, x = net.backbone, torch.randn(2, 3, 64, 32)
    seen = R.token_attention(backbone, x)
    given = []
    hook = backbone.blocks[-1].attn.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad(): backbone.forward_features(x)
    hook.remove()
    attn, tokens = backbone.blocks[-1].attn, given[0]
    dim, d = tokens.shape[-1], tokens.shape[-1] // attn.num_heads
    with torch.no_grad(): q, k = (attn.qkv(tokens)[..., i * dim:(i + 1) * dim] for i in (0, 1))
    for i in range(2):
        for token in range(4):
            rows = []
            for head in range(attn.num_heads):
                part = slice(head * d, (head + 1) * d)
                rows.append(torch.softmax(k[i, :, part] @ q[i, token, part] / d**.5, 0))
            of_patches = torch.stack(rows).mean(0)[4:]
            np.testing.assert_allclose(seen[i, token].flatten(), of_patches / of_patches.sum(), rtol=1e-4)


def test_attention_of_latents_has_a_place_for_every_frame(net):
    clips = torch.randn(2, 4, 3, 30, 24)                             # padded to 32x24
    seen = R.latent_attention(net, clips)
    assert seen.shape == (2, 6, 4, 4, 3) and torch.allclose(seen.sum((2, 3, 4)), torch.ones(2, 6))
    other = clips.clone()
    other[:, 3] = torch.randn(2, 3, 30, 24)
    moved = (R.latent_attention(net, other) - seen).abs().amax((0, 1, 3, 4))
    assert moved[3] > 1e-4                                           # of the frame that changed


def test_mass_inside_is_a_sum_over_pixels():
    rng = np.random.default_rng(0)
    seen, masks = torch.rand(3, 2, 4, 2), rng.random((3, 3, 16, 8)) < .3
    masks[1, 2] = False
    found = R.mass_inside(seen, masks)
    assert np.isnan(found[1, :, 2]).all() and np.isfinite(found[0]).all()
    for t in range(2):
        spread = np.repeat(np.repeat(seen[0, t].numpy(), 4, 0), 4, 1) / 16             # a patch of 4x4 pixels
        np.testing.assert_allclose(found[0, t], [(spread * mask).sum() for mask in masks[0]], rtol=1e-5)


def test_shuffled_frames_are_the_same_frames_in_an_order_of_their_own(net):
    class Index(torch.nn.Module):
        name, input, embed_dim = "index", net.input, 4
        def forward(self, clips): return clips[:, :, 0, 0, 0]
    clips = torch.arange(4.).expand(50, 4)[..., None, None, None].expand(-1, -1, 3, 2, 2)
    one, two = (R._Shuffled(Index())(clips) for _ in range(2))
    assert torch.equal(one, two) and (one.sort(1).values == torch.arange(4.)).all() and len(one.unique(dim=0)) > 10


def test_controls_know_sizes_or_nothing(drawn):
    root, samples = drawn
    some = samples[samples["pid"] > 0].reset_index(drop=True)
    images = np.stack([np.asarray(open_image(root / path)) for path in some["path"]])
    truth, boxes = (to_labels(*source.parts(images, some)) for source in (WorldParts(root), CONTROLS["boxes"](root)))
    assert (boxes != truth).any(axis=(1, 2)).all() and len(some) > 10
    for own, other in zip(truth, boxes):
        areas = part_boxes(own)[0][:, 2:].prod(1)
        found = np.array([np.count_nonzero(other == a + 1) for a in range(3)])
        assert (found <= areas).all() and (found == areas).any()                  # fewer where two boxes meet
    strips = to_labels(*Strips().parts(images))
    assert (strips == strips[:1]).all() and set(np.unique(strips)) == {1, 2, 3}
    assert CONTROLS["boxes"](root).settings != WorldParts(root).settings          # a store is of one source

"""The resampler is Flamingo's, line by line; its output knows no T; what it refuses."""
import pytest
import torch

from cion_nb.video.resampler import Resampler


def flamingo(net, x):
    "The published form, written out: (n, T, m, D) -> (n, L, D), heads and frames one by one."
    def norm(layer, v): return torch.nn.functional.layer_norm(v, v.shape[-1:], layer.weight, layer.bias)
    out = []
    for clip in x:
        if net.frame is not None: clip = torch.stack([frame + net.frame[t, 0] for t, frame in enumerate(clip)])
        media, q = clip.reshape(-1, clip.shape[-1]), net.latents
        for layer in net.layers:
            u, v = norm(layer.norm_tokens, media), norm(layer.norm_latents, q)
            both, seen = torch.cat([u, v]), []
            keys, values = (both @ layer.key_value.weight.T).chunk(2, dim=1)
            queries = v @ layer.query.weight.T
            d = queries.shape[1] // layer.heads
            for h in range(layer.heads):
                own = slice(h * d, h * d + d)
                seen.append((queries[:, own] * d ** -.5 @ keys[:, own].T).softmax(1) @ values[:, own])
            q = q + torch.cat(seen, 1) @ layer.out.weight.T
            first, inner, _, outer = layer.feedforward
            q = q + torch.nn.functional.gelu(norm(first, q) @ inner.weight.T) @ outer.weight.T
        out.append(norm(net.norm, q))
    return torch.stack(out)


@pytest.mark.parametrize("settings, T", [(dict(), 8), (dict(depth=1, heads=2, dim_head=12, latents=5), 3),
                                         (dict(frames=0, latents=3), 11), (dict(heads=3, frames=4), 1)])
def test_it_is_flamingos_form(settings, T):
    torch.manual_seed(0)
    net, x = Resampler(24, **settings).double(), torch.randn(2, T, 7, 24, dtype=torch.double)
    assert torch.allclose(net(x), flamingo(net, x), atol=1e-10)


@pytest.mark.parametrize("frames", [8, 0])
def test_order_counts_where_frames_have_vectors(frames):
    torch.manual_seed(0)
    net, x = Resampler(24, 6, frames=frames).double(), torch.randn(1, 8, 5, 24, dtype=torch.double)
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    assert torch.allclose(net(x), net(x[:, order]), atol=1e-9) == (frames == 0)
    assert torch.allclose(net(x), net(x[:, :, [4, 2, 0, 1, 3]]), atol=1e-9), "inside a frame, place is in the token"


@pytest.mark.parametrize("T", [1, 2, 8])
def test_the_output_has_no_T(T):
    net = Resampler(24, 6)
    assert net(torch.zeros(2, T, 5, 24)).shape == (2, 6, 24)


def test_parameters_by_the_formula():
    with torch.device("meta"): net = Resampler(768, latents=64, depth=2, frames=8)
    count = sum(p.numel() for p in net.parameters())
    assert count == 2 * 6_296_064 + 49_152 + 6_144 + 1_536 == 12_648_960
    assert not [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear) and m.bias is not None]


@pytest.mark.parametrize("make, word", [
    (lambda: Resampler(24)(torch.zeros(1, 9, 2, 24)), "9 frames, and the resampler has vectors for 8"),
    (lambda: Resampler(24)(torch.zeros(1, 2, 2, 12)), "width 12 for a resampler of width 24"),
    (lambda: Resampler(24)(torch.zeros(1, 2, 24)), r"tokens of shape \(1, 2, 24\): .n, T, m, D. are needed"),
    (lambda: Resampler(24, latents=0), "latents must be .*got 0"), (lambda: Resampler("24"), "dim must be .*'24'"),
    (lambda: Resampler(24, depth=1.5), "depth must be .*1.5"), (lambda: Resampler(24, heads=0), "heads must .*got 0"),
    (lambda: Resampler(24, frames=-1), "frames must be .*0 or more, got -1")])
def test_what_it_refuses(make, word):
    with pytest.raises(ValueError, match=word): make()

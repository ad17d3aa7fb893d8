"""Parts, blocks and batched products change no label, on no device."""
import numpy as np
import pandas as pd
import pytest
from examples import random_world

from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities import parts
from cion_nb.identities.denoise import denoise
from cion_nb.identities.levels import clean_and_sum, lay_out, read_rows
from cion_nb.identities.parts import blocks, clean_on_device


def test_blocks_never_divide_a_group():
    offsets, groups = np.array([0, 3, 5, 9, 10, 30, 31]), np.array([0, 0, 1, 2, 3, 4])
    assert list(blocks(offsets, groups, 9)) == [(0, 3), (3, 4), (4, 5), (5, 6)]
    assert list(blocks(offsets, groups, 1)) == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert list(blocks(offsets, groups, 99)) == [(0, 6)] and list(blocks(np.array([0]), np.empty(0), 9)) == []


@pytest.mark.parametrize("part_rows, floats", [(1, 1), (300, 500), (2000, 2**21)])
def test_parts_and_blocks_change_nothing(part_rows, floats, monkeypatch):
    x, samples = feature_world(80, dim=16, seed=8)
    samples["video"] = samples.video.where(samples.tracklet >= 20, "one long video")
    want = denoise(x, samples)
    monkeypatch.setattr(parts, "PART_ROWS", (part_rows, part_rows))
    monkeypatch.setattr(parts, "_BLOCK_FLOATS", floats)
    got = denoise(x, samples)
    for name in ("provenance", "tracklets", "links", "noise"):
        pd.testing.assert_frame_equal(getattr(got, name), getattr(want, name), check_exact=True)


# ---------------------------------------------------------------- Eq. 4 by batched products

@pytest.mark.slow("hundreds of random worlds")
@pytest.mark.parametrize("kind", ["clusters", "lattice", "copies", "axes"])
@pytest.mark.parametrize("floats", [40, 2**26])
def test_batched_products_decide_alike(kind, floats):
    for seed in range(40):
        x, samples = random_world(seed, kind, 60, dim=3)
        layout = lay_out(samples, x)
        rows = read_rows(x, layout.rows)
        for sigma in (.05, .2, 1.0, 2.0, np.inf):
            a, b = clean_and_sum(rows, layout.offsets,
                                 sigma), clean_on_device(rows, layout.offsets, sigma, device="cpu", floats=floats)
            assert np.array_equal(a[0], b[0]) and np.array_equal(a[3], b[3])
            np.testing.assert_allclose(a[1], b[1], atol=1e-8)
            np.testing.assert_allclose(a[2], b[2], atol=1e-9)


@pytest.mark.slow("eleven thousand tracklets")
def test_batched_products_through_the_door(world, monkeypatch):
    _, x, samples, want = world
    monkeypatch.setattr(
        parts, "clean_and_sum", lambda x, offsets, sigma: clean_on_device(x, offsets, sigma, device="cpu"))
    got = denoise(x, samples, measure=False)
    assert np.array_equal(got.labels, want.labels) and got.provenance.state.equals(want.provenance.state)


@pytest.mark.skipif(not parts.torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_labels(world):
    _, x, samples, want = world
    for kw in (dict(), dict(half_width=None)):
        a, b = denoise(x, samples, measure=False, **kw), denoise(x, samples, measure=False, device="cuda", **kw)
        assert np.array_equal(a.labels, b.labels) and a.provenance.state.equals(b.provenance.state)
    bad = np.array(x)
    bad[5] = 0
    with pytest.raises(ValueError, match="rows 5"): denoise(bad, samples, measure=False, device="cuda")

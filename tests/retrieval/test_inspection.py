"""Distances by pair, the worst queries, maps of what a network looks at."""
import warnings

import numpy as np
import pytest
import torch
from examples import tables
from oracles import cosine

from cion_nb.models.architectures import ARCHITECTURES
from cion_nb.models.backbones import create_backbone
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.retrieval.inspection import activation_map, by_person, hardest, pair_distances


def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kw)


@pytest.mark.parametrize("protocol", ["market", "no_camera"])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_pair_distances_count_every_pair_once(protocol, memory):
    rng = np.random.default_rng(0)
    query, gallery = tables(rng, 25, 80)
    q, g = rng.normal(size=(25, 8)), rng.normal(size=(80, 8))
    d = cosine(q, g)
    same = (query.pid.to_numpy()[:, None] == gallery.pid.to_numpy()) & (query.pid.to_numpy()[:, None] >= 0)
    out = (gallery.pid.to_numpy() == -1)[None] | (query.pid.to_numpy() < 0)[:, None]
    if protocol == "market":
        out = (out | same & (query.camid.to_numpy()[:, None] == gallery.camid.to_numpy())
               & (query.camid.to_numpy()[:, None] >= 0))
    pairs = quiet(pair_distances, q, g, query, gallery, protocol, memory=memory)
    assert pairs.right.sum() == (same & ~out).sum() and pairs.wrong.sum() == (~same & ~out).sum()
    for t in (.5, 1., 1.5):
        assert pairs.at(t) == (pytest.approx((d[same & ~out] < t).mean(), abs=.02),
                               pytest.approx((d[~same & ~out] < t).mean(), abs=2e-3))
    for rate in (.01, .1, .5):
        t = pairs.threshold(rate)
        assert pairs.at(t)[1] <= rate, "never more false matches than were allowed"
        assert (d[~same & ~out] < t + 2e-4).mean() > rate - 1 / pairs.wrong.sum() - 1e-3, (
            "and no lower threshold than needed")


def test_worst_first():
    rng = np.random.default_rng(1)
    query, gallery = tables(rng, 40, 200)
    score = quiet(evaluate, rng.normal(size=(40, 6)), rng.normal(size=(200, 6)), query, gallery)
    worst = hardest(score, 5)
    assert worst.AP.tolist() == sorted(score.per_query.AP.dropna())[:5]
    people = by_person(score)
    assert people.mAP.is_monotonic_increasing and people.queries.sum() == score.per_query.AP.notna().sum()


SMALLEST = {a.family: name for name, a in sorted(ARCHITECTURES.items(), key=lambda item: -item[1].parameters)
            if a.in_paper}


@pytest.mark.slow("builds large networks")
@pytest.mark.parametrize("arch", sorted(SMALLEST.values()))
def test_maps_of_every_family(arch):
    """A map of the input's size, from a network that is left as it was, and that follows a lone bright patch of the
    image.
    """
    model = create_backbone(arch, (128, 64)).train()
    heat = activation_map(model, np.random.default_rng(0).integers(0, 255, (128, 64, 3), dtype=np.uint8))
    assert heat.shape == (128, 64) and heat.min() == 0 and heat.max() == pytest.approx(1)
    assert all(m.training for m in model.modules())


def test_a_map_points_at_what_it_should():
    "With a network that passes brightness on, the map is where the brightness is."
    class Bright(torch.nn.Module):
        num_features = 3
        def __init__(self):
            super().__init__()
            self.input = create_backbone("resnet10_tiny", (64, 32)).input
            self.w = torch.nn.Parameter(torch.ones(1))
        def forward_features(self, x): return torch.nn.functional.avg_pool2d(x - x.amin(), 8)
    image = np.zeros((64, 32, 3), np.uint8)
    image[40:56, 8:16] = 255
    y, x = np.unravel_index(activation_map(Bright(), image).argmax(), (64, 32))
    assert 40 <= y < 56 and 8 <= x < 16


def test_no_map_of_what_has_no_map():
    from cion_nb.models.backbones import create_backbone
    from cion_nb.training.mgn import MGN
    with pytest.raises(ValueError, match="MGN has none"):
        activation_map(MGN(create_backbone("resnet18", (96, 32)), 4), np.zeros((96, 32, 3), np.uint8))

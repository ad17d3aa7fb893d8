"""Each equation by hand: ties, the order of steps, which centroids are asked."""
import math

import numpy as np
import pytest
from examples import angles
from oracles import agrees_with_plain, distance, mean

from cion_nb.core.samples import make_samples
from cion_nb.identities.denoise import denoise
from cion_nb.identities.levels import clean_tracklets
from cion_nb.identities.pairs import unit_rows

# ---------------------------------------------------------------- single rules

def test_of_two_the_later_by_frame_then_path_goes():
    x = angles(0, 90)
    assert denoise(x, make_samples(["a", "b"], tracklet=0, frame=[4, 3])).labels.tolist() == [-1, 0]
    assert denoise(x, make_samples(["b", "a"], tracklet=0, frame=[3, 3])).labels.tolist() == [-1, 0]
    # paths compare as text
    assert denoise(x, make_samples(["img10", "img9"], tracklet=0)).labels.tolist() == [0, -1]


def test_ties_in_eq5_go_to_the_earlier_tracklet():
    # image 3 is as far from tracklet 5 as from tracklet 2
    x = angles(0, 0, 0, 90, 88, 92)
    samples = make_samples(list("abcdef"), tracklet=[9, 9, 9, 9, 2, 5], frame=[0, 1, 2, 3, 8, 7])
    assert denoise(x, samples, sigma_drm=0).provenance.to_tracklet[3] == 5       # which begins earlier, in frame 7
    assert denoise(x, samples.assign(frame=[0, 1, 2, 3, 7, 7]), sigma_drm=0).provenance.to_tracklet[3] == 2


def test_ties_in_eq5_reach_to_1e_9():
    "The later tracklet is nearer, but by 3e-10 only; by 3e-8 it wins."
    samples = make_samples(list("abcdef"), tracklet=[9, 9, 9, 9, 2, 5], frame=[0, 1, 2, 3, 8, 7])
    for radians, tracklet in ((1e-8, 5), (1e-6, 2)):
        got = denoise(angles(0, 0, 0, 90, 92 - math.degrees(radians), 88), samples, sigma_drm=0)
        assert got.provenance.to_tracklet[3] == tracklet


def test_ties_in_eq4_reach_to_1e_9():
    "Images 0 and 1 lie on either side of the rest; the earlier one is farther out, by less or by more than 1e-9."
    samples = make_samples(list("abcdef"), tracklet=0, frame=range(6))
    for radians, last in ((1e-10, [0, 1, 0, 0, 0, 0]), (1e-6, [1, 0, 0, 0, 0, 0])):
        rounds, _ = clean_tracklets(angles(-60 - math.degrees(radians), 60, 0, 0, 0, 0), np.array([0, 6]), .2)
        assert (rounds == 1).tolist() == [bool(v) for v in last]
    assert denoise(angles(-60, 60, 0, 0, 0, 0), samples).provenance["round"].tolist() == [2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5, 1e-7])
def test_others_that_nearly_cancel_out(left):
    "The short formula loses its digits where the mean of the others is short; the definition does not."
    x = np.array([[1, 0, 0], [-1, left, 0], [.3, .5, .8], [-.3, -.5, -.8 + left]])
    rounds, deviation = clean_tracklets(unit_rows(x), np.array([0, 4]), 2)
    units = unit_rows(x)
    for i in range(4):
        assert deviation[i] == pytest.approx(distance(units[i], mean([units[j].tolist() for j in range(4) if j != i])),
                                             abs=1e-8)
    three = unit_rows(x[:3])
    assert clean_tracklets(three, np.array([0, 3]), 2)[1][2] == pytest.approx(
        distance(three[2], mean(three[:2].tolist())), abs=1e-8)


def test_reallocation_uses_the_centroids_left_by_eq4_and_eq6_those_with_the_newcomers():
    x = angles(0, 0, 0, 70, 100, 100, 60)
    samples = make_samples(list("abcdefg"), tracklet=[0, 0, 0, 0, 1, 1, 2], frame=range(7))
    got = denoise(x, samples)
    assert got.provenance.to_tracklet[3] == 2
    assert got.provenance.distance[3] == pytest.approx(1 - math.cos(math.radians(10)))
    # 65° and 100°: 35° apart, 0.181; without the newcomer 40°
    assert len(got.links) == 0
    assert len(denoise(x, samples, sigma_drm=1 - math.cos(math.radians(37))).links) == 1


def test_half_width_counts_identities_after_merging():
    x = angles(0, 100, 103, 200, 5)
    samples = make_samples(list("abcde"), video=["v0", "v1", "v1", "v2", "v3"], tracklet=range(5))
    assert denoise(x, samples, half_width=3).labels.tolist() == [0, 1, 1, 2, 0]  # 3 positions away: v1 is one identity
    assert denoise(x, samples, half_width=2).labels.tolist() == [0, 1, 1, 2, 3]


def test_merged_centroid_is_the_mean_of_all_images():
    # 6:1 puts the merged centroid near 4°, 41° from 45°
    x = angles(0, 0, 0, 0, 0, 0, 30, 45)
    samples = make_samples(list("abcdefgh"), video=["a"] * 7 + ["b"], tracklet=[0] * 6 + [1, 2])
    assert denoise(x, samples).labels.tolist() == [0] * 7 + [1]


def test_position_uses_the_trackers_lowest_frame():
    "A tracklet keeps its place although its first image is removed."
    x = angles(180, 0, 0, 90)
    samples = make_samples(list("abcd"), tracklet=[0, 0, 0, 1], frame=[1, 9, 10, 5])
    assert denoise(x, samples).tracklets.tracklet.tolist() == [0, 1]


def test_long_tracklet_with_many_removals():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(1, 6)) + .25 * rng.normal(size=(220, 6)), rng.normal(size=(80, 6))])[
        rng.permutation(300)]
    agrees_with_plain(x,
                      make_samples([f"{i:03d}" for i in range(300)], tracklet=np.arange(300) // 290, frame=range(300)))


def test_eq4_on_one_block():
    rounds, deviation = clean_tracklets(angles(0, 2, 4, 80, 170), np.array([0, 4, 5]), .2)
    assert rounds.tolist() == [0, 0, 0, 1, 0] and np.isnan(deviation[4])
    assert deviation[3] == pytest.approx(1 - math.cos(math.radians(78)))

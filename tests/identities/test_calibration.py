"""Thresholds from unlabelled data: definitions, properties, and what the data cannot say."""
import numpy as np
import pandas as pd
import pytest
from examples import identities

from cion_nb.core.samples import make_samples
from cion_nb.data.feature_worlds import street_world
from cion_nb.identities import calibration as C
from cion_nb.identities.calibration import calibrate
from cion_nb.identities.levels import clean_tracklets, lay_out
from cion_nb.identities.linking import seen_together
from cion_nb.identities.pairs import unit_rows
from cion_nb.identities.truth import identity_scores

QUICK = dict(k1=(5,), eps=(.3, .45), centres=(None,))
KEYS = {"sigma_cst", "sigma_drm", "link", "k1", "k2", "eps", "min_samples", "centre", "half_width"}


@pytest.fixture(scope="module")
def world(): return street_world(n_people=40, videos=10)


# ---- the numbers are what they say ----------

def test_own_and_other_are_their_definitions(world):
    features, samples = world
    layout = lay_out(samples)
    x = unit_rows(features)[layout.rows]
    together = seen_together(samples, layout)
    own, other, source = C._own_and_other(x, layout, together, np.random.default_rng(0))
    # sigma 2 removes nothing: the deviations of all images
    assert np.allclose(own, clean_tracklets(x, layout.offsets, 2.0)[1])
    partner, again = C._partners(layout, together, np.random.default_rng(0))
    of = np.repeat(np.arange(len(layout.tracklets)), np.diff(layout.offsets))
    for i in (0, 100, len(x) - 1):
        mean = x[of == partner[of[i]]].mean(0)
        assert other[i] == pytest.approx(1 - x[i] @ mean / np.linalg.norm(mean))
    assert source == again and source["seen together"] == len(np.unique(np.r_[together.a, together.b]))
    assert sum(source.values()) == len(layout.tracklets)
    met = {*zip(together.a, together.b), *zip(together.b, together.a)}
    has = np.isin(np.arange(len(partner)), np.r_[together.a, together.b])
    assert all((t, p) in met for t, p in enumerate(partner) if has[t]) and (partner != np.arange(len(partner))).all()
    assert (layout.video[partner] == layout.video).all()


def test_partners_where_videos_are_short():
    samples = make_samples([f"{i}" for i in range(5)], video=["a", "b", "b", "c", "c"], tracklet=[0, 1, 2, 3, 4],
                           frame=[0, 0, 9, 0, 9])
    layout = lay_out(samples)
    partner, source = C._partners(layout, seen_together(samples, layout), np.random.default_rng(0))
    assert source == {"seen together": 0, "same video": 4, "another video": 1} and partner[0] != 0
    assert partner[1:].tolist() == [2, 1, 4, 3]
    one = make_samples(["x"], video="a", tracklet=0, frame=0)
    assert C._partners(lay_out(one), seen_together(one, lay_out(one)), np.random.default_rng(0))[0].tolist() == [-1]


def test_judge_counts_pairs_of_images():
    counts, video = np.array([2, 3, 1, 4, 5]), np.array([0, 0, 0, 1, 1])
    class Seen:
        a, b = np.array([0, 3]), np.array([1, 4])
        def __len__(self): return 2
    state = dict(trusts_frames=True, counts=counts, video=video, together=Seen(),
                 spaces={None: C._Space(np.ones(5), (np.array([0, 0]), np.array([1, 2])), np.eye(5))})
    seen = C._judge(np.array([0, 0, 0, 1, 2]), state, None)
    assert seen["merged"] == 2 * 3 + 2 * 1 + 3 * 1 and seen["support"] == pytest.approx((2 * 3 + 2 * 1) / 11)
    # one pair joined: too few to say
    assert seen["joined"] == 0.5 and seen["identities"] == 3 and seen["largest"] == 3 and np.isnan(seen["framed"])
    nothing = C._judge(np.arange(5), state, None)
    assert nothing["merged"] == 0 and np.isnan(nothing["support"]) and nothing["joined"] == 0


def test_frames_leave_a_largest_precision():
    """60 pairs seen together, 30 of them joined: half of all pairs of the video's tracklets would be false, out of
    those that were merged.
    """
    n = 24
    class Seen:
        a, b = np.repeat(np.arange(12), 5), 12 + (np.repeat(np.arange(12), 5) + np.tile(np.arange(5), 12)) % 12
        def __len__(self): return 60
    labels = np.where(np.arange(n) % 12 < 6, 0, np.arange(n))
    joined = np.mean(labels[Seen.a] == labels[Seen.b])
    state = dict(trusts_frames=True, counts=np.ones(n, int), video=np.zeros(n, int), together=Seen(),
                 spaces={None: C._Space(np.ones(n), (np.empty(0, int),) * 2, np.eye(n), alike=.02)})
    false = joined - .02 - np.sqrt(joined / 60)
    assert C._judge(labels, state, None)["framed"] == pytest.approx(
        max(0, 1 - false * (n * (n - 1) / 2) / (12 * 11 / 2)))
    assert np.isnan(C._judge(labels, state | dict(trusts_frames=False), None)["framed"])


@pytest.mark.parametrize("level", [0, 1])
def test_the_lonely_are_who_they_should_be(level, monkeypatch):
    "Half of the groups keep one unit; everybody else stays; whoever then shares a label with another unit is counted."
    seen = {}
    def levels(state, half_width, **how):
        seen["rows"] = state["sums"][:, 0].astype(int)
        # these end together, the others alone
        label = np.where(np.isin(seen["rows"], how["linked"]), 0, 1 + np.arange(len(seen["rows"])))
        return label, label
    monkeypatch.setattr(C, "_levels", levels)
    unit = np.array([0, 0, 1, 2, 3, 4, 4, 5, 6, 7]) if level else np.arange(10)
    group = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 4])                           # tracklets; 4 is alone from the start
    state = dict(sums=np.arange(10)[:, None], counts=np.ones(10), video=np.zeros(10))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tried, linked = C._lonely(state, None, dict(linked=[]), group, unit, level, rng)
        gone = np.setdiff1d(np.arange(10), seen["rows"])
        of_unit = pd.Series(group).groupby(unit).first()
        several = of_unit.value_counts().loc[lambda n: n > 1].index
        assert linked == 0 and tried == -(-len(several) // 2)
        left = [g for g in several if len(np.unique(unit[[r for r in seen["rows"] if group[r] == g]])) == 1]
        assert len(left) == tried
        assert all(len({u for u in unit[gone] if of_unit[u] == g}) == (of_unit == g).sum() - 1 for g in left)
        assert set(group[gone]) == set(left)
        tried, linked = C._lonely(state, None, dict(linked=range(10)), group, unit, level, np.random.default_rng(seed))
        # everybody ends together: all of them are linked to strangers
        assert linked == tried


@pytest.mark.parametrize("partners, q", [(0., .5), (.6, .1), (.9, .3), (1., .9)])
def test_the_share_of_mistakes_is_a_bound(partners, q, n=200_000):
    """Things with a partner are linked to it 8 times in 10, by a wide rule always; lonely ones are linked with
    probability q, by a wide rule with 0.9.
    """
    rng = np.random.default_rng(1)
    has = rng.random(n) < partners
    linked, widely = np.where(has, rng.random(n) < .8, rng.random(n) < q), np.where(has, True, rng.random(n) < .9)
    false = (linked & ~has).sum() / linked.sum()
    rule, wide = C._Left(linked.mean(), n, int(round(q * n))), C._Left(widely.mean(), n, int(.9 * n))
    assert 1 - partners <= wide.lonely(2) + .01 and wide.lonely() <= wide.lonely(2)
    assert false <= rule.mistaken(wide.lonely(2)) + .01 <= rule.mistaken() + .01
    if partners in (0., 1.): return
    # the wide rule knows how many are lonely
    assert abs(rule.mistaken(wide.lonely(2)) - false) < .02 < rule.mistaken() - false + .01
    assert C._Left(linked.mean(), n, n // 100).mistaken() < rule.mistaken()                       # grows with q


def test_the_choice():
    asked = []
    def table(*rows):
        return pd.DataFrame([dict(merged=m, support=s, framed=f, alone=np.nan, strangers=np.nan, precision=np.nan)
                             for m, s, f, _ in rows])
    def choose(*rows):
        asked.clear()
        t = table(*rows)
        return C._choose(t, lambda i: asked.append(i) or (rows[i][3], np.nan)), t
    a, b, chain, seen, lonely, small = ((200, .99, np.nan, .95), (230, 1., np.nan, .88), (900, .5, np.nan, 1.),
                                        (300, 1., .5, 1.), (310, 1., np.nan, .3), (50, 1., np.nan, 1.))
    at, t = choose(small, a, b, chain, seen, lonely)
    # of nearly equal ones the most trusted; a chain is never asked, nor one too small to win
    assert at == 1 and asked == [5, 4, 2, 1]
    assert t["precision"].round(2).tolist()[1:3] == [.95, .88] and t["precision"][4] == .5
    assert np.isnan(t["precision"][0])
    assert choose(chain, seen, lonely)[0] is None and choose(small)[0] == 0
    assert choose((0, np.nan, np.nan, 1.))[0] is None


def test_strangers_are_counted_as_the_slow_way_does(world):
    _, samples = world
    layout = lay_out(samples)
    rng = np.random.default_rng(0)
    times = C._times(samples["frame"].to_numpy(), layout, rng)
    by = samples.groupby("tracklet")["frame"].agg(["min", "max"]).loc[layout.tracklets]
    pairs = [(i, j) for i in range(len(by)) for j in range(i) if layout.video[i] == layout.video[j]]
    gap = [max(by["min"].iloc[i] - by["max"].iloc[j], by["min"].iloc[j] - by["max"].iloc[i]) for i, j in pairs]
    assert times["n_far"] == sum(g >= times["far"] for g in gap)
    assert abs(times["far"] - np.median([g for g in gap if g > 0])) <= 1
    labels = rng.integers(0, 20, len(by))
    assert {tuple(sorted(p, reverse=True)) for p in C._inside(labels, layout.video).T} == {
        (i, j) for i, j in pairs if labels[i] == labels[j]}


def test_the_share_of_strangers_is_an_upper_one():
    # of 2000 strangers, one in 100 is joined
    joined = np.random.default_rng(0).binomial(2000, .01, 400)
    bound = np.array([C._at_most(np.arange(j), 2000) for j in joined])
    assert (bound >= .01).mean() > .9 and np.median(bound) < .018
    # one chain tells less than 20 links
    assert C._at_most(np.zeros(20, int), 2000) > C._at_most(np.arange(20), 2000)
    assert C._at_most(np.empty(0, int), 0) == 1 and C._at_most(np.empty(0, int), 100) == pytest.approx(.0233)


# ---- what it proposes ----------

def test_a_proposal_reaches_what_it_is_for(world):
    features, samples = world
    calibration = calibrate(features, samples)
    assert set(calibration.parameters) == KEYS
    assert all("certainly two people vouch" in w for w in calibration.warnings)       # few strangers meet here
    raw, made = (identity_scores(l, samples["pid"].to_numpy())
                 for l in (samples["tracklet"].to_numpy(), identities(calibration, features, samples)))
    assert made.f1 > 2.5 * raw.f1 and made.precision > 0.85
    chosen = calibration.candidates.query("chosen")
    assert len(chosen) == 1 and chosen["link"].iloc[0] == calibration.link
    errors = calibration.errors
    # at n²/2 pairs it must be far less than a fifth
    assert errors.loc["sigma_cst"].drop("value").max() < .2 and errors.loc["sigma_drm", "two_people_kept"] < .02
    assert "sigma_cst" in calibration._repr_html_() and "Calibration" in repr(calibration)
    assert len(calibration.plot().axes) == 3


def test_truth_is_not_read_and_units_do_not_matter(world):
    features, samples = world
    wanted = calibrate(features, samples, **QUICK).parameters
    assert calibrate(features, samples.assign(pid=-1), **QUICK).parameters == wanted
    assert calibrate(features * 7.5, samples, **QUICK).parameters == wanted
    renamed = samples.assign(tracklet=10**6 + 3 * samples["tracklet"])
    assert calibrate(features, renamed, **QUICK).parameters == wanted
    inside = np.lexsort((np.random.default_rng(0).random(len(samples)), samples["video"]))
    assert calibrate(features[inside], samples.iloc[inside].reset_index(drop=True), **QUICK).parameters == wanted


def test_sigma_cst_may_be_given(world):
    assert calibrate(*world, sigma_cst=0.5, **QUICK).sigma_cst == 0.5
    with pytest.raises(ValueError, match="sigma_cst"): calibrate(*world, sigma_cst=3)

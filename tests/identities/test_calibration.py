"""Thresholds from unlabelled data: definitions, properties, and what the data cannot say."""
import numpy as np
import pandas as pd
import pytest

from cion_nb.core.samples import make_samples
from cion_nb.data.feature_worlds import feature_world, street_world
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


def identities(calibration, features, samples):
    "Labels of the rows by the proposed parameters, through the levels."
    table, x, layout, _ = C._look(features, samples, 10**6, 10**7)
    p = calibration.parameters
    state = C._state(x, table, layout, p["sigma_cst"], 1000, None, ())
    how = {k: p[k] for k in (("sigma_drm",) if p["link"] == "threshold" else ("k1", "k2", "eps", "min_samples"))}
    label = np.append(C._levels(state, 1000, p["link"], p["centre"], **how)[1], -1)
    of = np.repeat(np.arange(len(layout.tracklets)), np.diff(layout.offsets)); of[state["rounds"] > 0] = state["to"]
    out = np.empty(len(samples), np.int64); out[layout.rows] = label[of]
    return out


# ---- the numbers are what they say ---------------------------------------------------------------------------------------------------

def test_own_and_other_are_their_definitions(world):
    features, samples = world
    layout = lay_out(samples); x = unit_rows(features)[layout.rows]
    together = seen_together(samples, layout)
    own, other, source = C._own_and_other(x, layout, together, np.random.default_rng(0))
    assert np.allclose(own, clean_tracklets(x, layout.offsets, 2.0)[1])            # sigma 2 removes nothing: the deviations of all images
    partner, again = C._partners(layout, together, np.random.default_rng(0))
    of = np.repeat(np.arange(len(layout.tracklets)), np.diff(layout.offsets))
    for i in (0, 100, len(x) - 1):
        mean = x[of == partner[of[i]]].mean(0)
        assert other[i] == pytest.approx(1 - x[i] @ mean / np.linalg.norm(mean))
    assert source == again and source["seen together"] == len(np.unique(np.r_[together.a, together.b])) and sum(source.values()) == len(layout.tracklets)
    met = {*zip(together.a, together.b), *zip(together.b, together.a)}
    has = np.isin(np.arange(len(partner)), np.r_[together.a, together.b])
    assert all((t, p) in met for t, p in enumerate(partner) if has[t]) and (partner != np.arange(len(partner))).all()
    assert (layout.video[partner] == layout.video).all()


def test_partners_where_videos_are_short():
    samples = make_samples([f"{i}" for i in range(5)], video=["a", "b", "b", "c", "c"], tracklet=[0, 1, 2, 3, 4], frame=[0, 0, 9, 0, 9])
    layout = lay_out(samples)
    partner, source = C._partners(layout, seen_together(samples, layout), np.random.default_rng(0))
    assert source == {"seen together": 0, "same video": 4, "another video": 1} and partner[0] != 0 and partner[1:].tolist() == [2, 1, 4, 3]
    one = make_samples(["x"], video="a", tracklet=0, frame=0)
    assert C._partners(lay_out(one), seen_together(one, lay_out(one)), np.random.default_rng(0))[0].tolist() == [-1]


def test_judge_counts_pairs_of_images():
    counts, video = np.array([2, 3, 1, 4, 5]), np.array([0, 0, 0, 1, 1])
    class Seen:
        a, b = np.array([0, 3]), np.array([1, 4])
        def __len__(self): return 2
    state = dict(trusts_frames=True, counts=counts, video=video, together=Seen(), spaces={None: C._Space(np.ones(5), (np.array([0, 0]), np.array([1, 2])), np.eye(5))})
    seen = C._judge(np.array([0, 0, 0, 1, 2]), state, None)
    assert seen["merged"] == 2 * 3 + 2 * 1 + 3 * 1 and seen["support"] == pytest.approx((2 * 3 + 2 * 1) / 11)
    assert seen["joined"] == 0.5 and seen["identities"] == 3 and seen["largest"] == 3 and np.isnan(seen["framed"])    # one pair joined: too few to say
    nothing = C._judge(np.arange(5), state, None)
    assert nothing["merged"] == 0 and np.isnan(nothing["support"]) and nothing["joined"] == 0


def test_frames_leave_a_largest_precision():
    "60 pairs seen together, 30 of them joined: half of all pairs of the video's tracklets would be false, out of those that were merged."
    n = 24
    class Seen:
        a, b = np.repeat(np.arange(12), 5), 12 + (np.repeat(np.arange(12), 5) + np.tile(np.arange(5), 12)) % 12
        def __len__(self): return 60
    labels = np.where(np.arange(n) % 12 < 6, 0, np.arange(n))
    joined = np.mean(labels[Seen.a] == labels[Seen.b])
    state = dict(trusts_frames=True, counts=np.ones(n, int), video=np.zeros(n, int), together=Seen(), spaces={None: C._Space(np.ones(n), (np.empty(0, int),) * 2, np.eye(n), alike=.02)})
    false = joined - .02 - np.sqrt(joined / 60)
    assert C._judge(labels, state, None)["framed"] == pytest.approx(max(0, 1 - false * (n * (n - 1) / 2) / (12 * 11 / 2)))
    assert np.isnan(C._judge(labels, state | dict(trusts_frames=False), None)["framed"])


@pytest.mark.parametrize("level", [0, 1])
def test_the_lonely_are_who_they_should_be(level, monkeypatch):
    "Half of the groups keep one unit; everybody else stays; whoever then shares a label with another unit is counted."
    seen = {}
    def levels(state, half_width, **how):
        seen["rows"] = state["sums"][:, 0].astype(int)
        label = np.where(np.isin(seen["rows"], how["linked"]), 0, 1 + np.arange(len(seen["rows"])))      # these end together, the others alone
        return label, label
    monkeypatch.setattr(C, "_levels", levels)
    unit = np.array([0, 0, 1, 2, 3, 4, 4, 5, 6, 7]) if level else np.arange(10)
    group = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 4])                           # tracklets; 4 is alone from the start
    state = dict(sums=np.arange(10)[:, None], counts=np.ones(10), video=np.zeros(10))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tried, linked = C._lonely(state, None, dict(linked=[]), group, unit, level, rng)
        gone = np.setdiff1d(np.arange(10), seen["rows"])
        of_unit = pd.Series(group).groupby(unit).first(); several = of_unit.value_counts().loc[lambda n: n > 1].index
        assert linked == 0 and tried == -(-len(several) // 2)
        left = [g for g in several if len(np.unique(unit[[r for r in seen["rows"] if group[r] == g]])) == 1]
        assert len(left) == tried and all(len({u for u in unit[gone] if of_unit[u] == g}) == (of_unit == g).sum() - 1 for g in left) and set(group[gone]) == set(left)
        tried, linked = C._lonely(state, None, dict(linked=range(10)), group, unit, level, np.random.default_rng(seed))
        assert linked == tried                                                  # everybody ends together: all of them are linked to strangers


@pytest.mark.parametrize("partners, q", [(0., .5), (.6, .1), (.9, .3), (1., .9)])
def test_the_share_of_mistakes_is_a_bound(partners, q, n=200_000):
    "Things with a partner are linked to it 8 times in 10, by a wide rule always; lonely ones are linked with probability q, by a wide rule with 0.9."
    rng = np.random.default_rng(1)
    has = rng.random(n) < partners
    linked, widely = np.where(has, rng.random(n) < .8, rng.random(n) < q), np.where(has, True, rng.random(n) < .9)
    false = (linked & ~has).sum() / linked.sum()
    rule, wide = C._Left(linked.mean(), n, int(round(q * n))), C._Left(widely.mean(), n, int(.9 * n))
    assert 1 - partners <= wide.lonely(2) + .01 and wide.lonely() <= wide.lonely(2)
    assert false <= rule.mistaken(wide.lonely(2)) + .01 <= rule.mistaken() + .01
    if partners in (0., 1.): return
    assert abs(rule.mistaken(wide.lonely(2)) - false) < .02 < rule.mistaken() - false + .01       # the wide rule knows how many are lonely
    assert C._Left(linked.mean(), n, n // 100).mistaken() < rule.mistaken()                       # grows with q


def test_the_choice():
    asked = []
    def table(*rows): return pd.DataFrame([dict(merged=m, support=s, framed=f, alone=np.nan, strangers=np.nan, precision=np.nan) for m, s, f, _ in rows])
    def choose(*rows):
        asked.clear(); t = table(*rows)
        return C._choose(t, lambda i: asked.append(i) or (rows[i][3], np.nan)), t
    a, b, chain, seen, lonely, small = (200, .99, np.nan, .95), (230, 1., np.nan, .88), (900, .5, np.nan, 1.), (300, 1., .5, 1.), (310, 1., np.nan, .3), (50, 1., np.nan, 1.)
    at, t = choose(small, a, b, chain, seen, lonely)
    assert at == 1 and asked == [5, 4, 2, 1]                      # of nearly equal ones the most trusted; a chain is never asked, nor one too small to win
    assert t["precision"].round(2).tolist()[1:3] == [.95, .88] and t["precision"][4] == .5 and np.isnan(t["precision"][0])
    assert choose(chain, seen, lonely)[0] is None and choose(small)[0] == 0 and choose((0, np.nan, np.nan, 1.))[0] is None


def nobody_returns(seed, dim, videos=24, cast=12, images=8, light=.7, noise=.9, switches=.08, twins=0.):
    "Everybody is seen in one video, once; a share `twins` of each direction is that of one of 40 kinds of people."
    rng = np.random.default_rng(seed); n = videos * cast
    directions = lambda *shape: rng.standard_normal((*shape, dim)) / np.sqrt(dim)
    person = np.sqrt(1 - twins) * directions(n) + np.sqrt(twins) * directions(40)[rng.integers(0, 40, n)]
    walk = np.repeat(np.arange(n), images); video = walk // cast
    frame = rng.integers(0, 20, n)[walk] + np.tile(np.arange(images), n)
    shown = np.where(rng.random(len(walk)) < switches, video * cast + rng.integers(0, cast, len(walk)), walk)
    x = person[shown] + light * directions(videos)[video] + noise * directions(len(walk))
    return x.astype(np.float32), make_samples([f"{i}" for i in range(len(walk))], pid=shown, video=[f"v{v:03d}" for v in video],
                                              tracklet=walk, frame=frame, x=(walk % cast) * 90., y=0., w=60., h=160.)


@pytest.mark.parametrize("seed, dim, twins", [(0, 8, 0.), (1, 8, .8), (2, 12, 0.), (0, 12, .8), (0, 64, .9)])
def test_where_nobody_comes_back_nothing_is_linked(seed, dim, twins):
    "Those left alone lose their look-alikes, and believe in links that are all wrong; certain strangers keep them."
    calibration = calibrate(*nobody_returns(seed, dim, twins=twins), k1=(5, 10), eps=(.3, .45), centres=("video",))
    assert calibration.sigma_drm == 0 and calibration.link == "threshold"
    assert any("links nothing" in w for w in calibration.warnings)
    assert calibration.candidates["strangers"].max() < C.OF_PEOPLE


def test_where_frames_say_nothing_the_proposal_says_so(world):
    features, samples = world
    cases = {"no frame numbers": dict(frame=-1), "no two tracklets of a video": dict(video=samples["tracklet"].astype(str))}
    for why, change in cases.items():
        calibration = calibrate(features, samples.assign(**change), **QUICK)
        said = [w for w in calibration.warnings if "may link strangers" in w]
        assert calibration.sigma_drm > 0 and len(said) == 1 and why in said[0]
    assert not calibrate(features, samples, **QUICK).warnings


@pytest.mark.parametrize("dim, frames, links", [(4, True, False), (6, False, False), (12, False, True)])
def test_narrow_features_link_nothing_where_strangers_cannot_be_asked(dim, frames, links):
    "In few directions strangers are as near as one person; in more, without frames, the proposal stays, and says what it rests on."
    features, samples = nobody_returns(4, dim)
    calibration = calibrate(features, samples if frames else samples.assign(frame=-1), k1=(5, 10), eps=(.3, .45), centres=("video",))
    assert (calibration.sigma_drm > 0) == ("chosen" in calibration.candidates) == links
    (said,) = [w for w in calibration.warnings if "nothing tells which tracklets are certainly two people" in w]
    assert ("fewer than 8" in said) != links and ("no frame numbers" in said) != frames


def test_directions_are_the_participation_ratio():
    rng = np.random.default_rng(0); scale = np.r_[np.ones(5), np.full(27, .1)]
    x = rng.standard_normal((4000, 32)) * scale
    units, video = x / np.linalg.norm(x, axis=1, keepdims=True), np.arange(4000) % 4
    values = np.linalg.eigvalsh(np.cov(C.centre_on_videos(units, video).T))
    assert C._directions(units, video) == pytest.approx(values.sum()**2 / (values**2).sum())
    assert 5 < C._directions(units, video) < 6
    few = C._directions(units[:20], video[:20])                                        # fewer tracklets than dimensions
    values = np.linalg.eigvalsh(np.cov(C.centre_on_videos(units[:20], video[:20]).T))
    assert few == pytest.approx(values.sum()**2 / (values**2).sum())
    assert C._directions(np.ones((9, 4)) / 2, np.zeros(9, int)) == 0                   # all alike: no direction at all


def test_strangers_are_counted_as_the_slow_way_does(world):
    _, samples = world
    layout = lay_out(samples); rng = np.random.default_rng(0)
    times = C._times(samples["frame"].to_numpy(), layout, rng)
    by = samples.groupby("tracklet")["frame"].agg(["min", "max"]).loc[layout.tracklets]
    pairs = [(i, j) for i in range(len(by)) for j in range(i) if layout.video[i] == layout.video[j]]
    gap = [max(by["min"].iloc[i] - by["max"].iloc[j], by["min"].iloc[j] - by["max"].iloc[i]) for i, j in pairs]
    assert times["n_far"] == sum(g >= times["far"] for g in gap) and abs(times["far"] - np.median([g for g in gap if g > 0])) <= 1
    labels = rng.integers(0, 20, len(by))
    assert {tuple(sorted(p, reverse=True)) for p in C._inside(labels, layout.video).T} == {(i, j) for i, j in pairs if labels[i] == labels[j]}


def test_the_share_of_strangers_is_an_upper_one():
    joined = np.random.default_rng(0).binomial(2000, .01, 400)                         # of 2000 strangers, one in 100 is joined
    bound = np.array([C._at_most(np.arange(j), 2000) for j in joined])
    assert (bound >= .01).mean() > .9 and np.median(bound) < .018
    assert C._at_most(np.zeros(20, int), 2000) > C._at_most(np.arange(20), 2000)       # one chain tells less than 20 links
    assert C._at_most(np.empty(0, int), 0) == 1 and C._at_most(np.empty(0, int), 100) == pytest.approx(.0233)


# ---- what it proposes ----------------------------------------------------------------------------------------------------------------

def test_a_proposal_reaches_what_it_is_for(world):
    features, samples = world
    calibration = calibrate(features, samples)
    assert set(calibration.parameters) == KEYS and not calibration.warnings
    raw, made = (identity_scores(l, samples["pid"].to_numpy()) for l in (samples["tracklet"].to_numpy(), identities(calibration, features, samples)))
    assert made.f1 > 2.5 * raw.f1 and made.precision > 0.85
    chosen = calibration.candidates.query("chosen")
    assert len(chosen) == 1 and chosen["link"].iloc[0] == calibration.link
    errors = calibration.errors
    assert errors.loc["sigma_cst"].drop("value").max() < .2 and errors.loc["sigma_drm", "two_people_kept"] < .02      # at n²/2 pairs it must be far less than a fifth
    assert "sigma_cst" in calibration._repr_html_() and "Calibration" in repr(calibration) and len(calibration.plot().axes) == 3


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


def test_noise_is_called_noise(world):
    _, samples = world
    lost = calibrate(np.random.default_rng(0).standard_normal((len(samples), 64)), samples, **QUICK)
    assert any("does not separate" in w for w in lost.warnings) and any("no rule of linking can be trusted" in w for w in lost.warnings)
    assert lost.link == "threshold" and "chosen" not in lost.candidates                 # nothing is proposed that merges


@pytest.mark.parametrize("fragments", [1, 2])
def test_where_nobody_comes_back_hardly_anybody_is_joined(fragments):
    "Everybody walks through one video and is never seen again: look-alikes are each other's nearest, and only being left alone tells."
    rng = np.random.default_rng(0); n, videos, images, dim = 160, 8, 6, 96
    directions = lambda *shape: rng.standard_normal((*shape, dim)) / np.sqrt(dim)
    who = np.repeat(np.arange(n), fragments * images); video = who % videos; tracklet = np.arange(len(who)) // images
    x = directions(n)[who] + .4 * directions(videos)[video] + .5 * directions(len(who))
    samples = make_samples([f"{i}" for i in range(len(who))], pid=who, video=[f"v{v}" for v in video], tracklet=tracklet, frame=-1)
    calibration = calibrate(x, samples, k1=(5, 10), eps=(.3, .45, .55))
    raw, made = (identity_scores(l, who) for l in (tracklet, identities(calibration, x, samples)))
    table = calibration.candidates
    by_support = (table.merged * table.support).where(table.support >= C.SUPPORT, -1).idxmax()          # what support alone would choose
    own = (np.bincount(tracklet) * (np.bincount(tracklet) - 1) / 2).sum()
    if fragments == 1: assert own / (own + table.merged[by_support]) < .65 and made.precision > .8 and made.f1 > .9      # every merge is wrong
    else: assert made.precision > .8 and made.f1 > raw.f1 + .2                      # two fragments of everybody: those are found


@pytest.mark.parametrize("seed", range(4))
def test_mixed_samples_are_taken_apart(seed):
    rng = np.random.default_rng(seed)
    wrong, alike = rng.uniform(0, .25, 2)
    one, two = rng.beta(4, 14, 20_000), rng.beta(14, 6, 20_000)
    i, j = int(wrong * 10_000), int(alike * 10_000)
    found = C._separate(np.r_[one[:10_000 - i], two[:i]], np.r_[two[-(10_000 - j):], one[-j:] if j else one[:0]])
    assert abs(found.wrong - wrong) < .04 and abs(found.alike - alike) < .04
    pure = C._separate(one, two)
    assert abs(found.threshold - pure.threshold) < .03 and (one >= found.threshold).mean() == pytest.approx((two < found.threshold).mean(), abs=.03)


def test_frames_that_say_nothing_are_not_believed():
    "In `feature_world` a person's tracklets of one video may share frames, which a tracker's never do for long."
    features, samples = feature_world(n_tracklets=480, seed=1)
    calibration = calibrate(features, samples)
    assert any("look like the same person" in w for w in calibration.warnings) and calibration.candidates["framed"].isna().all()
    assert any("that should be other people's look alike: nothing tells" in w for w in calibration.warnings)      # the reason is the right one
    raw, made = (identity_scores(l, samples["pid"].to_numpy()) for l in (samples["tracklet"].to_numpy(), identities(calibration, features, samples)))
    assert made.f1 > 2.5 * raw.f1 and made.precision > 0.85


# ---- tables that lack something ------------------------------------------------------------------------------------------------------

def test_frames_that_never_meet(world):
    features, samples = world
    alone = samples.assign(frame=np.arange(len(samples)))
    calibration = calibrate(features, alone, **QUICK)
    assert calibration.facts["seen_together"] == 0 and any("share frames" in n for n in calibration.notes) and calibration.candidates["framed"].isna().all()
    made = identity_scores(identities(calibration, features, alone), samples["pid"].to_numpy())
    assert made.precision > 0.8
    unknown = calibrate(features, samples.assign(frame=-1), **QUICK)
    assert unknown.facts["seen_together"] == 0


def test_without_boxes(world):
    features, samples = world
    calibration = calibrate(features, samples.drop(columns=list("xywh")), **QUICK)
    assert not calibration.facts["has_boxes"] and any("boxed twice" in n for n in calibration.notes)


def test_videos_of_one_tracklet(world):
    features, samples = world
    calibration = calibrate(features, samples.assign(video=samples["tracklet"].astype(str)), **QUICK)
    assert calibration.facts["partners"]["another video"] == samples["tracklet"].nunique() and set(calibration.parameters) == KEYS


@pytest.mark.parametrize("n", [1, 2, 3, 11, 12, 45])
def test_few_tracklets(world, n):
    features, samples = world
    few = np.flatnonzero(samples["tracklet"] < n)
    calibration = calibrate(features[few], samples.iloc[few].reset_index(drop=True), **QUICK)
    assert calibration.link == "threshold" and 0 <= calibration.sigma_drm <= 2 and any("100 tracklets or more" in note for note in calibration.notes)
    assert (calibration.sigma_cst == 0.2) == (len(few) < 100 or n == 1)
    calibration.plot(); calibration._repr_html_(); repr(calibration)


def test_tracklets_of_one_image(world):
    features, samples = world
    first = np.flatnonzero(~samples["tracklet"].duplicated())
    calibration = calibrate(features[first], samples.iloc[first].reset_index(drop=True), **QUICK)
    assert calibration.sigma_cst == 0.2 and any("sigma_cst = 0.2 is the paper's" in n for n in calibration.notes) and len(calibration.histograms["own"]) == 0


def test_equal_features(world):
    _, samples = world
    calibration = calibrate(np.ones((len(samples), 8)), samples, **QUICK)
    assert set(calibration.parameters) == KEYS


def test_a_large_table_is_looked_at_in_part():
    features, samples = street_world(n_people=80, videos=40, cast=10, images=3, dim=32)
    calibration = calibrate(features, samples, max_tracklets=200, **QUICK)
    assert calibration.facts["tracklets"] <= 200 and calibration.facts["of_tracklets"] == 800 and calibration.facts["videos"] >= 8
    assert calibrate(features, samples, max_tracklets=200, **QUICK).parameters == calibration.parameters
    layout = lay_out(samples)
    for limit in (dict(max_tracklets=200, max_images=10**6), dict(max_tracklets=10**6, max_images=500), dict(max_tracklets=8, max_images=10**6)):
        part = C._part(layout, **limit)
        assert (np.diff(part) > 0).all() and part.min() >= 0 and part.max() < 800 and 8 <= len(part) <= min(limit["max_tracklets"], 500 // 3 + 8)
    one = lay_out(samples.assign(video="all"))                                  # one video with all tracklets: cut
    part = C._part(one, 200, 10**6)
    assert 8 <= len(part) <= 200


@pytest.mark.parametrize("features, rows, message", [(np.ones((3, 4)), 5, "3 feature rows but 5"), (np.ones((0, 4)), 0, "nothing to calibrate"), (np.full((5, 4), np.nan), 5, "NaN"), (np.zeros((5, 4)), 5, "zero")])
def test_bad_input(features, rows, message):
    samples = make_samples([f"{i}" for i in range(rows)], video="v", tracklet=np.arange(rows) // 2, frame=np.arange(rows))
    with pytest.raises(ValueError, match=message): calibrate(features, samples)


def test_rows_without_tracklet():
    samples = make_samples(["a", "b"], video="v", tracklet=[0, -1], frame=[0, 1])
    with pytest.raises(ValueError, match="no tracklet"): calibrate(np.ones((2, 4)), samples)

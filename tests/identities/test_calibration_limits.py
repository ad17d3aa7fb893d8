"""Data that say little: strangers only, frames that say nothing or never meet, no boxes, few tracklets, bad input."""
import numpy as np
import pytest
from examples import identities

from cion_nb.core.samples import make_samples
from cion_nb.data.feature_worlds import feature_world, street_world
from cion_nb.identities import calibration as C
from cion_nb.identities.calibration import calibrate
from cion_nb.identities.levels import lay_out
from cion_nb.identities.truth import identity_scores

QUICK = dict(k1=(5,), eps=(.3, .45), centres=(None,))
KEYS = {"sigma_cst", "sigma_drm", "link", "k1", "k2", "eps", "min_samples", "centre", "half_width"}


@pytest.fixture(scope="module")
def world(): return street_world(n_people=40, videos=10)


def nobody_returns(seed, dim, videos=24, cast=12, images=8, light=.7, noise=.9, switches=.08, twins=0.):
    "Everybody is seen in one video, once; a share `twins` of each direction is that of one of 40 kinds of people."
    rng = np.random.default_rng(seed)
    n = videos * cast
    directions = lambda *shape: rng.standard_normal((*shape, dim)) / np.sqrt(dim)
    person = np.sqrt(1 - twins) * directions(n) + np.sqrt(twins) * directions(40)[rng.integers(0, 40, n)]
    walk = np.repeat(np.arange(n), images)
    video = walk // cast
    frame = rng.integers(0, 20, n)[walk] + np.tile(np.arange(images), n)
    shown = np.where(rng.random(len(walk)) < switches, video * cast + rng.integers(0, cast, len(walk)), walk)
    x = person[shown] + light * directions(videos)[video] + noise * directions(len(walk))
    return x.astype(np.float32), make_samples([f"{i}" for i in range(len(walk))], pid=shown,
                                              video=[f"v{v:03d}" for v in video],
                                              tracklet=walk, frame=frame, x=(walk % cast) * 90., y=0., w=60., h=160.)


@pytest.mark.parametrize("seed, dim, twins", [(0, 8, 0.), (1, 8, .8), (2, 12, 0.), (0, 12, .8), (0, 64, .9)])
def test_where_nobody_comes_back_nothing_is_linked(seed, dim, twins):
    "Those left alone lose their look-alikes, and believe in links that are all wrong; certain strangers keep them."
    calibration = calibrate(*nobody_returns(seed, dim, twins=twins), k1=(5, 10), eps=(.3, .45), centres=("video",))
    assert calibration.sigma_drm == 0 and calibration.link == "threshold"
    assert any("links nothing" in w for w in calibration.warnings)
    assert calibration.candidates["strangers"].max() < C.OF_PEOPLE


def test_what_certain_strangers_hardly_vouch_for_is_proposed_with_a_warning():
    "Look-alikes that hardly meet in a video pass the gate, and nine links of ten are wrong: this is said."
    features, samples = nobody_returns(1000, 32, twins=.8)
    calibration = calibrate(features, samples, k1=(5, 10), eps=(.3, .45), centres=("video",))
    row = calibration.candidates.query("chosen").iloc[0]
    (said,) = calibration.warnings
    assert C.OF_PEOPLE <= row.strangers < C.DOUBTED
    assert f"vouch for {row.strangers:.0%} of the merged pairs only" in said and "may link strangers" in said


@pytest.mark.parametrize("left, believed, doubted", [(.69, .95, True), (.7, .95, False), (1., .86, False)])
def test_the_doubt_begins_where_it_is_said_to(left, believed, doubted):
    state = dict(begin=np.zeros(3), trusts_frames=True, together=[(0, 1)], n_far=0)         # strangers can be asked
    assert bool(C._doubts(state, dict(strangers=left, precision=believed))) == doubted


def test_where_frames_say_nothing_the_proposal_says_so(world):
    features, samples = world
    cases = {"no frame numbers": dict(frame=-1),
             "no two tracklets of a video": dict(video=samples["tracklet"].astype(str))}
    for why, change in cases.items():
        calibration = calibrate(features, samples.assign(**change), **QUICK)
        said = [w for w in calibration.warnings if "may link strangers" in w]
        assert calibration.sigma_drm > 0 and len(said) == 1 and why in said[0]
    assert not any("nothing tells" in w for w in calibrate(features, samples, **QUICK).warnings)


@pytest.mark.parametrize("dim, frames, links", [(4, True, False), (6, False, False), (12, False, True)])
def test_narrow_features_link_nothing_where_strangers_cannot_be_asked(dim, frames, links):
    """In few directions strangers are as near as one person; in more, without frames, the proposal stays, and says what
    it rests on.
    """
    features, samples = nobody_returns(4, dim)
    calibration = calibrate(features, samples if frames else samples.assign(frame=-1), k1=(5, 10), eps=(.3, .45),
                            centres=("video",))
    assert (calibration.sigma_drm > 0) == ("chosen" in calibration.candidates) == links
    (said,) = [w for w in calibration.warnings if "nothing tells which tracklets are certainly two people" in w]
    assert ("fewer than 8" in said) != links and ("no frame numbers" in said) != frames


def test_directions_are_the_participation_ratio():
    rng = np.random.default_rng(0)
    scale = np.r_[np.ones(5), np.full(27, .1)]
    x = rng.standard_normal((4000, 32)) * scale
    units, video = x / np.linalg.norm(x, axis=1, keepdims=True), np.arange(4000) % 4
    values = np.linalg.eigvalsh(np.cov(C.centre_on_videos(units, video).T))
    assert C._directions(units, video) == pytest.approx(values.sum()**2 / (values**2).sum())
    assert 5 < C._directions(units, video) < 6
    few = C._directions(units[:20], video[:20])                                        # fewer tracklets than dimensions
    values = np.linalg.eigvalsh(np.cov(C.centre_on_videos(units[:20], video[:20]).T))
    assert few == pytest.approx(values.sum()**2 / (values**2).sum())
    assert C._directions(np.ones((9, 4)) / 2, np.zeros(9, int)) == 0                   # all alike: no direction at all


def test_noise_is_called_noise(world):
    _, samples = world
    lost = calibrate(np.random.default_rng(0).standard_normal((len(samples), 64)), samples, **QUICK)
    assert any("does not separate" in w for w in lost.warnings)
    assert any("no rule of linking can be trusted" in w for w in lost.warnings)
    # nothing is proposed that merges
    assert lost.link == "threshold" and "chosen" not in lost.candidates


@pytest.mark.parametrize("fragments", [1, 2])
def test_where_nobody_comes_back_hardly_anybody_is_joined(fragments):
    """Everybody walks through one video and is never seen again: look-alikes are each other's nearest, and only being
    left alone tells.
    """
    rng = np.random.default_rng(0)
    n, videos, images, dim = 160, 8, 6, 96
    directions = lambda *shape: rng.standard_normal((*shape, dim)) / np.sqrt(dim)
    who = np.repeat(np.arange(n), fragments * images)
    video = who % videos
    tracklet = np.arange(len(who)) // images
    x = directions(n)[who] + .4 * directions(videos)[video] + .5 * directions(len(who))
    samples = make_samples([f"{i}" for i in range(len(who))], pid=who, video=[f"v{v}" for v in video],
                           tracklet=tracklet, frame=-1)
    calibration = calibrate(x, samples, k1=(5, 10), eps=(.3, .45, .55))
    raw, made = (identity_scores(l, who) for l in (tracklet, identities(calibration, x, samples)))
    table = calibration.candidates
    # what support alone would choose
    by_support = (table.merged * table.support).where(table.support >= C.SUPPORT, -1).idxmax()
    own = (np.bincount(tracklet) * (np.bincount(tracklet) - 1) / 2).sum()
    # every merge is wrong
    if fragments == 1: assert own / (own + table.merged[by_support]) < .65 and made.precision > .8 and made.f1 > .9
    # two fragments of everybody: those are found
    else: assert made.precision > .8 and made.f1 > raw.f1 + .2


@pytest.mark.parametrize("seed", range(4))
def test_mixed_samples_are_taken_apart(seed):
    rng = np.random.default_rng(seed)
    wrong, alike = rng.uniform(0, .25, 2)
    one, two = rng.beta(4, 14, 20_000), rng.beta(14, 6, 20_000)
    i, j = int(wrong * 10_000), int(alike * 10_000)
    found = C._separate(np.r_[one[:10_000 - i], two[:i]], np.r_[two[-(10_000 - j):], one[-j:] if j else one[:0]])
    assert abs(found.wrong - wrong) < .04 and abs(found.alike - alike) < .04
    pure = C._separate(one, two)
    assert abs(found.threshold - pure.threshold) < .03
    assert (one >= found.threshold).mean() == pytest.approx((two < found.threshold).mean(), abs=.03)


def test_frames_that_say_nothing_are_not_believed():
    "In `feature_world` a person's tracklets of one video may share frames, which a tracker's never do for long."
    features, samples = feature_world(n_tracklets=480, seed=1)
    calibration = calibrate(features, samples)
    assert any("look like the same person" in w for w in calibration.warnings)
    assert calibration.candidates["framed"].isna().all()
    # the reason is the right one
    assert any("that should be other people's look alike: nothing tells" in w for w in calibration.warnings)
    raw, made = (identity_scores(l, samples["pid"].to_numpy())
                 for l in (samples["tracklet"].to_numpy(), identities(calibration, features, samples)))
    assert made.f1 > 2.5 * raw.f1 and made.precision > 0.85


# ---- tables that lack something ----------

def test_frames_that_never_meet(world):
    features, samples = world
    alone = samples.assign(frame=np.arange(len(samples)))
    calibration = calibrate(features, alone, **QUICK)
    assert calibration.facts["seen_together"] == 0 and any("share frames" in n for n in calibration.notes)
    assert calibration.candidates["framed"].isna().all()
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
    assert calibration.facts["partners"]["another video"] == samples["tracklet"].nunique()
    assert set(calibration.parameters) == KEYS


@pytest.mark.parametrize("n", [1, 2, 3, 11, 12, 45])
def test_few_tracklets(world, n):
    features, samples = world
    few = np.flatnonzero(samples["tracklet"] < n)
    calibration = calibrate(features[few], samples.iloc[few].reset_index(drop=True), **QUICK)
    assert calibration.link == "threshold" and 0 <= calibration.sigma_drm <= 2
    assert any("100 tracklets or more" in note for note in calibration.notes)
    assert (calibration.sigma_cst == 0.2) == (len(few) < 100 or n == 1)
    calibration.plot()
    calibration._repr_html_()
    repr(calibration)


def test_tracklets_of_one_image(world):
    features, samples = world
    first = np.flatnonzero(~samples["tracklet"].duplicated())
    calibration = calibrate(features[first], samples.iloc[first].reset_index(drop=True), **QUICK)
    assert calibration.sigma_cst == 0.2 and any("sigma_cst = 0.2 is the paper's" in n for n in calibration.notes)
    assert len(calibration.histograms["own"]) == 0


def test_equal_features(world):
    _, samples = world
    calibration = calibrate(np.ones((len(samples), 8)), samples, **QUICK)
    assert set(calibration.parameters) == KEYS


def test_a_large_table_is_looked_at_in_part():
    features, samples = street_world(n_people=80, videos=40, cast=10, images=3, dim=32)
    calibration = calibrate(features, samples, max_tracklets=200, **QUICK)
    assert calibration.facts["tracklets"] <= 200 and calibration.facts["of_tracklets"] == 800
    assert calibration.facts["videos"] >= 8
    assert calibrate(features, samples, max_tracklets=200, **QUICK).parameters == calibration.parameters
    layout = lay_out(samples)
    for limit in (dict(max_tracklets=200, max_images=10**6), dict(max_tracklets=10**6, max_images=500),
                  dict(max_tracklets=8, max_images=10**6)):
        part = C._part(layout, **limit)
        assert (np.diff(part) > 0).all() and part.min() >= 0 and part.max() < 800
        assert 8 <= len(part) <= min(limit["max_tracklets"], 500 // 3 + 8)
    one = lay_out(samples.assign(video="all"))                                  # one video with all tracklets: cut
    part = C._part(one, 200, 10**6)
    assert 8 <= len(part) <= 200


@pytest.mark.parametrize("features, rows, message",
                         [(np.ones((3, 4)), 5, "3 feature rows but 5"), (np.ones((0, 4)), 0, "nothing to calibrate"),
                          (np.full((5, 4), np.nan), 5, "NaN"), (np.zeros((5, 4)), 5, "zero")])
def test_bad_input(features, rows, message):
    samples = make_samples([f"{i}" for i in range(rows)], video="v", tracklet=np.arange(rows) // 2,
                           frame=np.arange(rows))
    with pytest.raises(ValueError, match=message): calibrate(features, samples)


def test_rows_without_tracklet():
    samples = make_samples(["a", "b"], video="v", tracklet=[0, -1], frame=[0, 1])
    with pytest.raises(ValueError, match="no tracklet"): calibrate(np.ones((2, 4)), samples)


@pytest.mark.parametrize("name, value", [("max_tracklets", -5), ("max_images", 0), ("min_samples", 0),
                                         ("min_samples", 2.5), ("max_images", True), ("device", "banana")])
def test_settings_without_meaning(name, value):
    features, samples = street_world(n_people=4, videos=2, cast=2, images=2, dim=8)
    with pytest.raises(ValueError, match=name): calibrate(features, samples, **{name: value})

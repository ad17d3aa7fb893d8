"""Eq. 4-7 against a plain, slow oracle written from the paper's formulas and the stated semantics: Python loops,
float64."""
import numpy as np
import pandas as pd
import pytest
from examples import PREFIXES, random_world
from hypothesis import given, settings, strategies as st
from oracles import agrees_with_plain, denoise_in_loops, denoise_plainly, distance

from cion_nb.core.samples import make_samples
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities import denoise as module
from cion_nb.identities.denoise import denoise
from cion_nb.identities.explain import counts
from cion_nb.identities.levels import closure
from cion_nb.identities.noise import noise
from cion_nb.identities.pairs import unit_rows
from cion_nb.identities.parts import LEVELS
from cion_nb.identities.truth import identity_scores

OTHERS = [("video",), ("cross",), ("tracklet", "cross"), ("video", "cross")]


# ---------------------------------------------------------------- against the oracles

worlds = dict(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), dim=st.integers(2, 6),
              half_width=st.sampled_from([0, 1, 2, 5, 1000, None]), levels=st.sampled_from(PREFIXES + OTHERS))


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=150, deadline=None)
@given(**worlds, sigma_cst=st.floats(.02, 1.5), sigma_drm=st.floats(.02, 1.5),
       dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_clusters(seed, n, dim, half_width, levels, sigma_cst, sigma_drm, dtype):
    x, samples = random_world(seed, "clusters", n, dim, dtype)
    agrees_with_plain(x, samples, sigma_cst=sigma_cst, sigma_drm=sigma_drm, half_width=half_width, levels=levels)


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=120, deadline=None)
@given(**worlds, kind=st.sampled_from(["lattice", "copies"]), sigma_cst=st.sampled_from([.0731, .2113, .3719]),
       sigma_drm=st.sampled_from([.0311, .1879, .4013]))
def test_ties(seed, n, dim, half_width, levels, kind, sigma_cst, sigma_drm):
    x, samples = random_world(seed, kind, n, dim)
    agrees_with_plain(x, samples, sigma_cst=sigma_cst, sigma_drm=sigma_drm, half_width=half_width, levels=levels)


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40),
       levels=st.sampled_from([("tracklet",), ("tracklet", "video")]), sigma_cst=st.sampled_from([1.0, 2.0]))
def test_exact_thresholds_and_means_without_direction(seed, n, levels, sigma_cst):
    x, samples = random_world(seed, "axes", n, 3)
    agrees_with_plain(x, samples, sigma_cst=sigma_cst, sigma_drm=.123, levels=levels)


@pytest.mark.slow("eleven thousand tracklets")
@pytest.mark.parametrize("half_width", [1, 40, 1000])
def test_thousands_of_tracklets(half_width):
    "Enough rows for several blocks, a video larger than a block, and more identities than a tile."
    x, samples = feature_world(3000, dim=768, images=6, per_video=12, seed=2, shift=.3)
    samples["video"] = samples.video.where(samples.tracklet >= 1100, "one long video")
    assert (samples.tracklet < 1100).sum() > 4 * (2**20 // 768)
    got = denoise(x, samples, half_width=half_width, measure=False)
    labels, state = denoise_in_loops(x, samples, half_width)
    assert got.labels.tolist() == labels.tolist() and got.provenance.state.tolist() == state
    assert got.tracklets.video_identity.max() > 1024 and {"kept", "reallocated", "discarded"} == set(state)


@pytest.mark.parametrize("seed", range(5))
def test_oracles_agree(seed):
    x, samples = feature_world(60, dim=24, images=6, seed=seed)
    slow, fast = denoise_plainly(x, samples, half_width=7), denoise_in_loops(x, samples, 7)
    assert slow[0].tolist() == fast[0].tolist() and slow[1] == fast[1]


# ---------------------------------------------------------------- properties

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["clusters", "lattice", "copies", "axes"]),
       levels=st.sampled_from(PREFIXES))
@pytest.mark.slow("hundreds of random worlds")
def test_row_order_inside_a_video_changes_nothing(seed, kind, levels):
    x, samples = random_world(seed, kind, 50)
    order = np.arange(50)
    for rows in samples.groupby("video").indices.values(): order[rows] = np.random.default_rng(seed).permutation(rows)
    a, b = denoise(x, samples, levels=levels), denoise(x[order], samples.iloc[order], levels=levels)
    assert np.array_equal(a.labels[order], b.labels)
    pd.testing.assert_frame_equal(a.provenance.iloc[order].reset_index(drop=True), b.provenance, check_exact=True)
    pd.testing.assert_frame_equal(a.tracklets, b.tracklets)
    pd.testing.assert_frame_equal(a.links, b.links, check_exact=True)


def test_rows_with_one_frame_and_path_are_ordered_by_their_features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3))
    samples = make_samples(["same.jpg"] * 30, tracklet=np.arange(30) // 10, frame=0)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(30)
        assert np.array_equal(denoise(x, samples, measure=False).labels[order],
                              denoise(x[order], samples.iloc[order], measure=False).labels)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["clusters", "lattice"]))
def test_new_tracklet_numbers_in_the_same_order_change_no_label(seed, kind):
    x, samples = random_world(seed, kind, 50)
    renamed = samples.assign(tracklet=samples.tracklet * 3 + 11)
    a, b = denoise(x, samples), denoise(x, renamed)
    assert np.array_equal(a.labels, b.labels) and np.array_equal(a.tracklets.tracklet * 3 + 11, b.tracklets.tracklet)


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_tracklet_numbers_only_rename_labels(seed):
    "Where no two tracklets of a video begin in one frame, their numbers decide nothing at all."
    x, samples = random_world(seed, "clusters", 50)
    samples = samples.assign(frame=np.arange(50))
    new = dict(zip(samples.tracklet.unique(), np.random.default_rng(seed).permutation(1000)))
    assert np.array_equal(denoise(x, samples).labels,
                          denoise(x, samples.assign(tracklet=samples.tracklet.map(new))).labels)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["clusters", "lattice", "copies"]))
def test_open_thresholds_change_nothing(seed, kind):
    x, samples = random_world(seed, kind, 50)
    got = denoise(x, samples, sigma_cst=2, sigma_drm=0)
    assert (got.provenance.state == "kept").all() and len(got.links) == 0
    assert np.array_equal(got.labels, got.labels_after("before")) and samples.tracklet.nunique() == got.labels.max() + 1


@pytest.mark.slow("hundreds of random worlds")
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["clusters", "lattice"]), sigma_cst=st.floats(.05, .8))
def test_what_each_state_promises(seed, kind, sigma_cst):
    x, samples = random_world(seed, kind, 60)
    got = denoise(x, samples, sigma_cst=sigma_cst)
    p, units = got.provenance, unit_rows(x)
    kept = {t: units[(p.from_tracklet == t) & (p.state == "kept")].mean(0) for t in samples.tracklet.unique()}
    for i in np.flatnonzero(p.state != "kept"):
        others = [distance(units[i], kept[t]) for t in samples.tracklet[samples.video == samples.video[i]].unique()
                  if t != samples.tracklet[i]]
        if p.state[i] == "discarded": assert all(d >= sigma_cst - 1e-9 for d in others) and p.identity[i] == -1
        else: assert min(others) == pytest.approx(p.distance[i], abs=1e-9) and p.distance[i] < sigma_cst
    assert (p[p.state == "kept"].distance.dropna() < sigma_cst).all() and all(len(c) for c in kept.values())
    assert (p.deviation[p["round"] > 0] >= sigma_cst - 1e-9).all()


def test_a_large_set_is_measured_on_a_sample_and_says_so(monkeypatch):
    "1,200 tracklets: n_S is estimated by default, the interval holds the exact one, and the result tells."
    x, samples = feature_world(1200, dim=16, images=3, seed=2)
    got, exact = denoise(x, samples), denoise(x, samples, measure=True)
    assert "estimated from 1,000 identities" in repr(got) and "estimated" not in repr(exact)
    assert "low" not in exact.noise
    assert ((got.noise.low <= exact.noise.n_S) & (exact.noise.n_S <= got.noise.high)).all()
    assert not got.noise.n_S.equals(exact.noise.n_S)
    assert (got.labels == exact.labels).all() and counts(got)["n_S is estimated"]
    assert "n_S is estimated" not in counts(exact)
    looked = []
    monkeypatch.setattr(module, "noises", lambda features, labellings, *a: looked.append(a[-1])
                        or [exact_noise] * len(labellings))
    exact_noise = noise(x, exact.labels)
    for n in (1000, 1001, 20_000, 433_000):
        module._noise_table(x, [("before", exact.labels)], dict(measure="auto", sigma_cst=.2, sigma_drm=.18), n, "cpu")
    assert looked == [None, 1000, 2000, 14713]


def test_noise_table_is_the_noise_of_the_labels_at_each_moment():
    x, samples = feature_world(200, seed=4)
    got = denoise(x, samples)
    assert list(got.noise.index) == ["before", *LEVELS]
    for level in got.noise.index:
        want = noise(x, got.labels_after(level))
        assert got.noise.n_S[level] == want.n_S and got.noise.n_identities[level] == want.n_identities
    assert np.array_equal(got.labels_after("cross"), got.labels)
    assert (got.labels_after("tracklet") == -1).sum() == (got.provenance["round"] > 0).sum()
    f1 = [identity_scores(got.labels_after(l), samples.pid).f1 for l in got.noise.index]
    assert f1[3] > f1[2] > f1[0] and got.noise.n_S["cross"] < got.noise.n_S["before"]
    with pytest.raises(ValueError, match="cross"): denoise(x, samples, levels=("tracklet",)).labels_after("cross")


@pytest.mark.parametrize("levels", PREFIXES + OTHERS)
def test_last_level_gives_the_labels(levels):
    x, samples = feature_world(100, seed=5)
    got = denoise(x, samples, levels=levels)
    last = levels[-1] if levels else "before"
    assert np.array_equal(got.labels, got.labels_after(last))
    assert list(got.noise.index) == ["before", *levels]
    assert (("video" in levels) or not (got.provenance.state == "reallocated").any())
    if "video" not in levels and "tracklet" in levels: assert (got.labels[got.provenance["round"] > 0] == -1).all()


def test_tables_tell_the_same_story():
    x, samples = feature_world(300, seed=6)
    got = denoise(x, samples)
    p, t, l = got.provenance, got.tracklets, got.links
    assert t.images.sum() == len(samples) and t.kept.sum() == (p.state == "kept").sum()
    assert t.came_in.sum() == (p.state == "reallocated").sum()
    assert (t.set_index("tracklet").identity.reindex(p.to_tracklet).fillna(-1).astype(int).tolist()
            == p.identity.tolist())
    by_number = t.set_index("tracklet")
    assert (by_number.identity[l.tracklet_a].to_numpy() == l.identity).all()
    assert (by_number.identity[l.tracklet_b].to_numpy() == l.identity).all()
    video, cross = l[l.level == "video"], l[l.level == "cross"]
    assert (by_number.video[video.a].to_numpy() == by_number.video[video.b].to_numpy()).all() and len(video)
    assert len(cross)
    assert (by_number.video_identity[cross.tracklet_a].to_numpy() == cross.a).all()
    # the links alone give the identities back
    n = t.video_identity.max() + 1
    assert np.array_equal(closure(n, cross.a.to_numpy(np.int64), cross.b.to_numpy(np.int64))[t.video_identity],
                          t.identity)


@pytest.mark.slow("eleven thousand tracklets")
@pytest.mark.parametrize("n_tracklets", [2_000, 20_000])
def test_large_worlds_equal_the_oracle(n_tracklets):
    x, samples = feature_world(n_tracklets, dim=48, images=5, seed=n_tracklets, dtype=np.float32)
    got = denoise(x, samples, measure=False)
    labels, state = denoise_in_loops(x, samples, 1000)
    assert np.array_equal(got.labels, labels) and got.provenance.state.tolist() == state
    assert labels.max() < n_tracklets / 2 and (labels == -1).any()

"""Pseudo-labels against scikit-learn's DBSCAN and filters in plain loops."""
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.cluster import DBSCAN

from cion_nb.core.samples import make_samples
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities.pseudo_labels import pseudo_labels


def plain(features, samples, eps, min_samples, min_span, min_score):
    "The definition: a set of (frozenset of rows) a kept person."
    people = set()
    for video, rows in samples.groupby("video").indices.items():
        x = np.float64(features[rows])
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        distance = np.clip(1 - x @ x.T, 0, 2)
        np.fill_diagonal(distance, 0)
        found = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(distance).labels_
        frame, score = samples.frame.to_numpy()[rows], samples.score.to_numpy(float)[rows]
        seen = sorted(set(frame))
        step = math.gcd(*(int(b - a) for a, b in zip(seen, seen[1:]))) or 1
        for c in set(found) - {-1}:
            best = {}
            for i in np.flatnonzero(found == c):
                if frame[i] not in best or score[i] > score[best[frame[i]]]: best[frame[i]] = i
            span = (max(best) - min(best) + step) / (seen[-1] - seen[0] + step)
            mean = sum(score[i] for i in best.values()) / len(best)
            if span >= min_span and mean >= min_score: people.add(frozenset(rows[i] for i in best.values()))
    return people


def groups(labels): return {frozenset(np.flatnonzero(labels == k)) for k in set(labels.tolist()) - {-1}}


def world(seed, n=60):
    "Boxes of several videos; scores on a grid of eighths, so that means are exact and ties are frequent."
    features, samples = feature_world(n, dim=12, images=6, per_video=10, scatter=.7, seed=seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(samples))
    samples = samples.iloc[order].reset_index(drop=True)
    samples["frame"] = rng.integers(0, 24, len(samples)) * np.where(samples.video == samples.video[0], 3, 1)
    samples["score"] = np.float32(rng.integers(1, 9, len(samples)) / 8)
    return features[order], samples


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([.1, .3, .45]), st.integers(1, 6), st.sampled_from([0, .4, .6, 1]),
       st.sampled_from([0, .5, .55]))
def test_they_are_the_definition(seed, eps, min_samples, min_span, min_score):
    features, samples = world(seed)
    found = pseudo_labels(features, samples, eps, min_samples, min_span, min_score)
    assert groups(found.labels) == plain(features, samples, eps, min_samples, min_span, min_score)
    kept = found.trajectories[found.trajectories.why == "kept"]
    assert sorted(kept.label) == list(range(len(kept))) and found.counts["people"] == len(groups(found.labels))


def test_a_video_of_thousands_of_boxes():
    "More rows than a tile of the pairs, and as many near pairs as one block holds."
    features, samples = feature_world(300, dim=48, images=20, per_video=150, per_person=6, scatter=.5, seed=2)
    samples["score"] = np.float32(np.random.default_rng(0).integers(1, 9, len(samples)) / 8)
    assert samples.video.value_counts().min() > 2_500
    found = pseudo_labels(features, samples, .3, 4, 0, .5)
    assert groups(found.labels) == plain(features, samples, .3, 4, 0, .5) and found.counts["people"] > 20


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_labels_know_no_order_no_scale_and_no_other_video(seed):
    features, samples = world(seed)
    found = pseudo_labels(features, samples)
    order = np.random.default_rng(seed).permutation(len(samples))
    if samples.groupby(["video", "frame"]).score.nunique().sum() == len(samples):      # ties are the first row's
        mixed = pseudo_labels(7 * features[order].astype(np.float32), samples.iloc[order].reset_index(drop=True))
        assert {frozenset(order[list(g)]) for g in groups(mixed.labels)} == groups(found.labels)
    one = (samples.video == samples.video[0]).to_numpy(bool)
    alone = pseudo_labels(features[one], samples[one].reset_index(drop=True))
    rows = np.flatnonzero(one)
    assert {frozenset(rows[list(g)]) for g in groups(alone.labels)} == groups(np.where(one, found.labels, -1))
    assert (samples.assign(label=found.labels).query("label >= 0").groupby("label").video.nunique() == 1).all()


def test_identities_in_the_table_change_nothing():
    features, samples = world(3)
    a = pseudo_labels(features, samples)
    b = pseudo_labels(features, samples.assign(pid=samples.pid.to_numpy()[::-1], tracklet=-1))
    assert np.array_equal(a.labels, b.labels)


def boxes(frames, scores=1., video="v"):
    table = make_samples([f"{video}{i}" for i in range(len(frames))], video=video, frame=frames)
    table["score"] = np.float32(np.broadcast_to(scores, len(frames)))
    return table


@pytest.mark.parametrize("frames, length, why", [
    ([0, 5, 9], 20, "kept"), ([0, 5, 8], 20, "short"),                 # exactly ten of twenty, and nine
    ([10, 15, 20], 40, "short"),                                       # at every fifth frame: 15 of 40
    ([10, 15, 20, 25], 40, "kept"), ([0], 1, "kept"), ([0], 3, "short")])
def test_the_limit_of_length(frames, length, why):
    found = pseudo_labels(np.ones((len(frames), 3)), boxes(frames), min_samples=1, lengths=dict(v=length))
    assert found.trajectories.why.tolist() == [why]


@pytest.mark.parametrize("scores, why", [([.5] * 3, "kept"), ([.3, .5, .7], "kept"), ([.3, .5, .69], "unsure"),
                                         ([.1, .2, .9, .9, .4], "kept"), ([.499] * 3, "unsure")])
def test_the_limit_of_scores(scores, why):
    found = pseudo_labels(np.ones((len(scores), 3)), boxes(range(len(scores)), scores), min_samples=1)
    assert found.trajectories.why.tolist() == [why]


def test_who_is_twice_in_a_frame_counts_once_and_only_there():
    "The mean is taken of what is left: a poor double does not make a trajectory unsure."
    table = boxes([0, 1, 1, 1, 2], [.6, .1, .6, .1, .6])
    found = pseudo_labels(np.ones((5, 2)), table, min_samples=4)
    assert found.labels.tolist() == [0, -1, 0, -1, 0] and found.doubles == 2
    assert found.trajectories.score[0] == pytest.approx(.6)


def test_where_nothing_is_kept_the_counts_say_so():
    found = pseudo_labels(np.eye(6), pd.concat([boxes([0, 1, 2]), boxes([0, 1, 2], video="w")], ignore_index=True))
    assert (found.labels == -1).all() and len(found.trajectories) == 0
    assert found.counts == dict(videos=2, labelled_videos=0, people=0, boxes=6, labelled_boxes=0)
    assert "0 people in 0 of 2 videos" in str(found)


@pytest.mark.parametrize("lengths, said", [(dict(w=9), "no video 'v'"), (dict(v=2), "box in frame 2")])
def test_lengths_that_cannot_be_are_refused(lengths, said):
    with pytest.raises(ValueError, match=said): pseudo_labels(np.ones((3, 2)), boxes([0, 1, 2]), lengths=lengths)

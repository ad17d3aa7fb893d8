"""Definitions written out slowly, from the papers and protocols alone: what more than one test compares with."""
import math

import numpy as np
import pandas as pd
from scipy import stats

from cion_nb.identities.denoise import denoise
from cion_nb.identities.parts import LEVELS


def mean(vectors): return [sum(column) / len(vectors) for column in zip(*vectors)]


def unit(v):
    length = math.sqrt(sum(a * a for a in v))
    return None if length < 1e-9 else [a / length for a in v]


def distance(a, b):
    "Cosine distance of two vectors in float64, clamped; 1 where one has no direction."
    a, b = unit(a), unit(b)
    return 1.0 if a is None or b is None else min(2.0, max(0.0, 1 - sum(p * q for p, q in zip(a, b))))


def components(n, links):
    label = list(range(n))
    for a, b in links: label = [label[a] if l == label[b] else l for l in label]
    seen = {}
    return [seen.setdefault(l, len(seen)) for l in label]


def denoise_plainly(features, samples, sigma_cst=0.2, sigma_drm=0.18, half_width=1000, levels=LEVELS):
    "labels, states, destinations, distances at the decision, links."
    x = [unit(row) for row in np.asarray(features, dtype=np.float64).tolist()]
    rows = [dict(r, row=i) for i, r in enumerate(samples[["path", "video", "tracklet", "frame"]].to_dict("records"))]
    videos = list(dict.fromkeys(r["video"] for r in rows))
    members = {}
    for r in rows: members.setdefault(r["tracklet"], []).append(r)
    for t in members: members[t] = [r["row"] for r in sorted(members[t], key=lambda r: (r["frame"], r["path"]))]
    video_of = {r["tracklet"]: videos.index(r["video"]) for r in rows}
    order = sorted(members, key=lambda t: (video_of[t], min(rows[i]["frame"] for i in members[t]), t))
    state, goes_to, at = ["kept"] * len(rows), {r["row"]: r["tracklet"] for r in rows}, [math.nan] * len(rows)

    removed = {}
    if "tracklet" in levels:                                                    # Eq. 4
        for t in order:
            while len(members[t]) > 1:
                d = [distance(x[i], mean([x[j] for j in members[t] if j != i])) for i in members[t]]
                for i, v in zip(members[t], d): at[i] = v
                if max(d) < sigma_cst: break
                worst = max(n for n, v in enumerate(d) if v >= max(d) - 1e-9)
                i = members[t].pop(worst)
                removed[i], state[i], goes_to[i] = t, "removed", -1
            if len(members[t]) == 1: at[members[t][0]] = math.nan
    if "video" in levels:                                                       # Eq. 5
        centroid = {t: mean([x[i] for i in members[t]]) for t in order}
        for i, t in removed.items():
            state[i], at[i] = "discarded", math.nan
            others = [(distance(x[i], centroid[o]), o) for o in order if o != t and video_of[o] == video_of[t]]
            if not others: continue
            at[i], new = next((d, o) for d, o in others if d <= min(others)[0] + 1e-9)
            if at[i] < sigma_cst: state[i], goes_to[i] = "reallocated", new
        for i, t in goes_to.items():
            if state[i] == "reallocated": members[t].append(i)
    groups, found = [[t] for t in order], []
    if "video" in levels:                                                       # Eq. 6
        c = [mean([x[i] for i in members[t]]) for t in order]
        links = [(a, b) for a in range(len(order)) for b in range(a + 1, len(order)) if video_of[order[a]]
                 == video_of[order[b]] and distance(c[a], c[b]) < sigma_drm]
        found += [("video", order[a], order[b]) for a, b in links]
        label = components(len(order), links)
        groups = [[t for t, l in zip(order, label) if l == k] for k in range(max(label, default=-1) + 1)]
    identity = list(range(len(groups)))
    if "cross" in levels:                                                       # Eq. 7
        c = [mean([x[i] for t in g for i in members[t]]) for g in groups]
        reach = len(groups) if half_width is None else half_width
        links = [(a, b) for a in range(len(groups)) for b in range(a + 1, min(a + reach, len(groups) - 1) + 1)
                 if distance(c[a], c[b]) < sigma_drm]
        found += [("cross", a, b) for a, b in links]
        identity = components(len(groups), links)
    label_of = {t: identity[k] for k, g in enumerate(groups) for t in g}
    labels = [label_of[goes_to[i]] if goes_to[i] != -1 else -1 for i in range(len(rows))]
    return np.array(labels, dtype=np.int64), state, [goes_to[i] for i in range(len(rows))], at, found


def agrees_with_plain(features, samples, **kw):
    "The door against the oracle: labels, states, destinations, distances, links."
    got = denoise(features, samples, measure=False, **kw)
    labels, state, to, at, links = denoise_plainly(features, samples, **kw)
    p = got.provenance
    assert p.state.tolist() == state
    assert got.labels.dtype == np.int64 and got.labels.tolist() == labels.tolist() == p.identity.tolist()
    assert p.to_tracklet.tolist() == to and p.from_tracklet.tolist() == samples.tracklet.tolist()
    np.testing.assert_allclose(p.distance, at, atol=1e-7)
    assert sorted(got.links[["level", "a", "b"]].astype(str).agg(tuple, axis=1)) == sorted(
        (l, str(a), str(b)) for l, a, b in links)
    return got


def denoise_in_loops(features, samples, half_width, sigma_cst=.2, sigma_drm=.18):
    """The same rules with NumPy inside the loops: for worlds that the plain oracle would take minutes for.
    `test_oracles_agree` holds the two together.
    """
    x = np.asarray(features, np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    table = samples.assign(row=np.arange(len(x)), rank=pd.factorize(samples.video)[0]).sort_values(["frame", "path"])
    tracklets = {}
    for t, row in zip(table.tracklet.tolist(), table.row.tolist()): tracklets.setdefault(t, []).append(row)
    rank = dict(zip(samples.tracklet, pd.factorize(samples.video)[0]))
    frame = samples.frame.to_numpy()
    order = sorted(tracklets, key=lambda t: (rank[t], frame[tracklets[t][0]], t))
    state, home, removed = ["kept"] * len(x), np.full(len(x), -1), []
    for p, t in enumerate(order):
        rows = tracklets[t]
        while len(rows) > 1:
            others = x[rows].sum(0) - x[rows]
            d = 1 - (x[rows] * others).sum(1) / np.linalg.norm(others, axis=1)
            if d.max() < sigma_cst: break
            removed.append((rows.pop(int(np.flatnonzero(d >= d.max() - 1e-9)[-1])), p))
        home[rows] = p
    c = np.stack([x[tracklets[t]].mean(0) for t in order])
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    video = np.array([rank[t] for t in order])
    for i, p in removed:
        others = np.flatnonzero((video == video[p]) & (np.arange(len(order)) != p))
        d = 1 - c[others] @ x[i]
        state[i] = "reallocated" if d.min() < sigma_cst else "discarded"
        if d.min() < sigma_cst: home[i] = others[np.flatnonzero(d <= d.min() + 1e-9)[0]]
    def merge(group, n, may):
        c = np.zeros((n, x.shape[1]))
        np.add.at(c, group[group >= 0], x[group >= 0])
        c /= np.linalg.norm(c, axis=1, keepdims=True)
        parent = list(range(n))
        def root(i):
            while parent[i] != i: i = parent[i]
            return i
        for at in range(0, n, 256):                     # a product a row took most of the time of a test
            for i, j in (at + np.argwhere(np.triu(1 - c[at:at + 256] @ c[at:].T < sigma_drm, 1))).tolist():
                if may(i, j):
                    a, b = sorted((root(i), root(j)))
                    parent[b] = a
        seen = {}
        return np.array([seen.setdefault(root(i), len(seen)) for i in range(n)])
    in_video = merge(home, len(order), lambda i, j: video[i] == video[j])
    group = np.where(home >= 0, in_video[home], -1)
    across = merge(group, in_video.max() + 1, lambda i, j: j - i <= half_width)
    return np.where(group >= 0, across[group], -1), state


def cosine(q, g):
    """float64 cosine distances, each pair by itself and divided last, so that equal rows and equal products give equal
    numbers.
    """
    q, g = q.astype(np.float64), g.astype(np.float64)
    lengths = np.sqrt((q ** 2).sum(1))[:, None] * np.sqrt((g ** 2).sum(1))
    return 1 - (q[:, None] * g[None]).sum(2) / lengths


def boxes_plainly(n, H, W, area, aspect, seed=0):
    """Random Erasing as released (Zhong et al. 2017): up to 100 tries of an area and an aspect h/w, both uniform; (n,
    4) top, left, height, width.
    """
    import random
    draw, out = random.Random(seed), []
    for _ in range(n):
        for _ in range(100):
            target, r = draw.uniform(*area) * H * W, draw.uniform(*aspect)
            h, w = int(round((target * r) ** .5)), int(round((target / r) ** .5))
            if w < W and h < H:
                out.append((draw.randint(0, H - h), draw.randint(0, W - w), h, w))
                break
        else: out.append((0, 0, 0, 0))
    return np.array(out)


def same_distribution(ours, theirs, *columns):
    for column in columns: assert stats.ks_2samp(column(ours.astype(float)), column(theirs.astype(float))).pvalue > 1e-3


# top, left, area, aspect
BOX = [lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / np.maximum(b[:, 3], 1)]


def cosine_distances(x):
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.maximum(1 - x @ x.T, 0)


def apart(n): return np.abs(np.subtract.outer(np.arange(n), np.arange(n)))


def nearest_plainly(d, k, half_width=None):
    d = d.copy()
    np.fill_diagonal(d, -1)
    if half_width is not None: d[apart(len(d)) > half_width] = np.inf
    index = np.argsort(d, axis=1, kind="stable")[:, :k]
    return np.where(np.isinf(np.take_along_axis(d, index, 1)), -1, index)


def check_lists(x, near, k, half_width=None, tolerance=1e-5):
    "Distances agree; sets agree except among ties; the row first; the order is (distance, index)."
    d = cosine_distances(x)
    index = nearest_plainly(d, k, half_width)
    missing = index < 0
    assert near.index.shape == near.distance.shape == index.shape and near.distance.dtype == np.float32
    assert ((near.index < 0) == missing).all() and (np.isinf(near.distance) == missing).all()
    assert np.allclose(near.distance[~missing], np.take_along_axis(d, near.index, 1)[~missing], atol=1e-6)
    assert np.allclose(near.distance[~missing], np.take_along_axis(d, index, 1)[~missing], atol=tolerance)
    assert (near.index[:, 0] == np.arange(len(x))).all() and (near.distance[:, 0] == 0).all()
    for row, at in zip(near.index, near.distance):
        own = row[row >= 0]
        assert len(set(own.tolist())) == len(own)
        assert (np.lexsort((own[1:], at[1:len(own)])) == np.arange(len(own) - 1)).all()
    if half_width is not None: assert (np.abs(near.index - np.arange(len(x))[:, None])[~missing] <= half_width).all()

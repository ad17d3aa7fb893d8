"""Small data, models and files that more than one test needs."""
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from cion_nb.core.samples import make_samples
from cion_nb.data.detectors import MOT_COLUMNS
from cion_nb.identities import calibration as C
from cion_nb.identities.parts import LEVELS
from cion_nb.models.architectures import InputSpec


def put(root, *names):
    for name in names:
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8)).save(path)
    return Path(root)


def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kw)


def warned(f, *args, **kw):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = f(*args, **kw)
    return out, [str(w.message) for w in caught]


PREFIXES = [(), ("tracklet",), ("tracklet", "video"), LEVELS]


def random_world(seed, kind, n=40, dim=4, dtype=np.float64):
    """A small table in disorder: videos interleaved, frames that collide, odd tracklet numbers, features that are not
    normalised.
    """
    rng = np.random.default_rng(seed)
    n_tracklets = int(rng.integers(1, max(2, n // 2)))
    tracklet = rng.integers(0, n_tracklets, n)
    numbers = rng.permutation(10 * n_tracklets)[:n_tracklets]
    video_of = rng.integers(0, max(1, n_tracklets // 4) + 1, n_tracklets)
    if kind == "clusters":
        x = rng.normal(size=(6, dim))[(tracklet + (rng.random(n) < .2)) % 6] + rng.choice([.1, .4, .8]) * rng.normal(
            size=(n, dim))
        x *= rng.uniform(.2, 5, (n, 1))
    # many equal vectors, exact ties
    elif kind == "lattice": x = rng.integers(0, 3, (n, dim)) + np.eye(dim)[rng.integers(0, dim, n)]
    # distances 0, 1, 2; means without direction
    elif kind == "axes": x = np.eye(dim)[rng.integers(0, dim, n)] * rng.choice([-1, 1], (n, 1))
    # three vectors, again and again
    else: x = np.repeat(rng.normal(size=(3, dim)), n, axis=0)[rng.permutation(3 * n)[:n]]
    frame = rng.integers(0, 5, n) if rng.random() < .5 else np.arange(n)
    paths = [f"{p:04d}.jpg" for p in rng.permutation(n)]
    return x.astype(dtype), make_samples(paths, video=[f"v{v}" for v in video_of[tracklet]], tracklet=numbers[tracklet],
                                         frame=frame)


def angles(*degrees): return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], -1)


def tables(rng, n_query, n_gallery, people=6, cameras=3):
    """Ids with junk (-1), distractors (0) and unknown cameras (-1) in the gallery, unknown people and cameras among the
    queries.
    """
    query = make_samples([f"q{i}" for i in range(n_query)], rng.integers(1, people + 1, n_query),
                         rng.integers(-1, cameras, n_query))
    gallery = make_samples([f"g{i}" for i in range(n_gallery)], rng.integers(-1, people + 1, n_gallery),
                           rng.integers(-1, cameras, n_gallery))
    query.loc[rng.random(n_query) < .05, "pid"] = -1
    return query, gallery


SPEC = InputSpec(8, 4)


class Mean(nn.Module):
    "A cheap extractor whose answer is known: mean colour, and how far the top differs from the bottom."
    def __init__(self, spec=SPEC, scale=1.0):
        super().__init__()
        self.scale, self.input, self.embed_dim = nn.Parameter(torch.tensor(scale)), spec, 6
    def forward(self, x): return self.scale * torch.cat([x.mean((2, 3)), x[:, :, 0].mean(2)], 1)


def names(n=40): return [f"{i:02}.{'jpg' if i % 2 else 'png'}" for i in range(n)]


def people(n, dim, per=10, scatter=.7, seed=0, dtype=np.float32, copies=0, strangers=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(max(1, n // per), dim))[rng.integers(0, max(1, n // per), n)] + scatter * rng.normal(
        size=(n, dim))
    if strangers: x[rng.choice(n, strangers, replace=False)] = 5 * rng.normal(size=(strangers, dim))
    if copies: x[rng.choice(n, copies, replace=False)] = x[0]
    return x.astype(dtype)


def paint(path, seed=0, size=(8, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)


def market(root):
    for folder, names in dict(bounding_box_train=["0002_c1s1_000451_03.jpg", "0002_c2s3_000001_01.jpg"],
                              query=["0005_c1s1_000001_00.jpg"],
                              bounding_box_test=["-1_c1s1_000401_03.jpg", "0000_c3s1_000001_01.jpg",
                                                 "0005_c6s4_010001_01.jpg"]).items():
        for i, name in enumerate(names): paint(root / folder / name, i)
        (root / folder / "Thumbs.db").touch()
    return root


def three_people(cls=lambda i: 1, flag=lambda i: 1, ids=lambda i: i, n=30, speed=1):
    "Three people who walk side by side, as rows of a truth file (frames from 0 here)."
    return pd.DataFrame([(f, ids(i), 100 * i + speed * f, 50, 40, 100, flag(i), cls(i), 1) for f in range(n)
                         for i in (1, 2, 3)], columns=list(MOT_COLUMNS))


def written(path, table, first=1, sep=",", encoding="utf-8"):
    path.write_bytes(
        table.assign(frame=table["frame"] + first).to_csv(header=False, index=False, sep=sep).encode(encoding))
    return path


def picture(h=64, w=32, seed=0, noise=12):
    "A smooth colourful picture with some noise, (3, h, w) uint8, channels last in memory."
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, 6, 4)).astype(np.float32))
    x = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic")[0].permute(1, 2, 0).numpy() + rng.normal(
        0, noise, (h, w, 3))
    return torch.from_numpy(x.clip(0, 255).round().astype(np.uint8)).permute(2, 0, 1)


def identities(calibration, features, samples):
    "Labels of the rows by the proposed parameters, through the levels."
    table, x, layout, _ = C._look(features, samples, 10**6, 10**7)
    p = calibration.parameters
    state = C._state(x, table, layout, p["sigma_cst"], 1000, None, ())
    how = {k: p[k] for k in (("sigma_drm",) if p["link"] == "threshold" else ("k1", "k2", "eps", "min_samples"))}
    label = np.append(C._levels(state, 1000, p["link"], p["centre"], **how)[1], -1)
    of = np.repeat(np.arange(len(layout.tracklets)), np.diff(layout.offsets))
    of[state["rounds"] > 0] = state["to"]
    out = np.empty(len(samples), np.int64)
    out[layout.rows] = label[of]
    return out


WALKS = (5, 1, 12, 3, 4, 30, 2)   # frames of the tracklets that `walks` makes


class ClipReader(nn.Module):
    "A model of clips whose answer depends on the frames' order."
    any_length = False
    def __init__(self, T=4, spec=SPEC):
        super().__init__()
        self.input, self.embed_dim = InputSpec(spec.height, spec.width, frames=T), 6
        self.weight = nn.Parameter(torch.linspace(.2, 1, T))
        self.seen = []
    def forward(self, x):
        self.seen.append(x.shape[:2])
        y = torch.cat([x.mean((3, 4)), x[:, :, :, 0].mean(3)], 2)
        return torch.einsum("ntd,t->nd", y.tanh(), self.weight) + y.amax(1)


def walks(root, counts=WALKS):
    "Tracklets of these lengths as files; their table."
    rows = []
    for t, n in enumerate(counts):
        for k in range(n):
            rows.append(dict(path=f"{t}_{k:03}.png", pid=t // 2, camid=t % 3, tracklet=7 * t, frame=k))
            if not (root / rows[-1]["path"]).exists():
                Image.fromarray(picture(16 + k % 3, 8, 100 * t + k).permute(1, 2, 0).contiguous().numpy()).save(
                    root / rows[-1]["path"])
    return make_samples(**{name: [row[name] for row in rows] for name in rows[0]})

"""Fixtures of more than one folder."""
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cion_nb.core.samples import make_samples, write_samples


@pytest.fixture
def theirs(monkeypatch):
    "A module of somebody else's classes: built with arguments, filled item by item, or both."
    module = types.ModuleType("theirs")
    exec("""
class Config(dict): pass
class Names(list): pass
class Kinds(set): pass
class Built:
    def __init__(self, a): self.a = a
    def __reduce__(self): return Built, (1,), {"x": 1}
class BuiltAndFilled(dict):
    def __init__(self, n=0): super().__init__()
    def __reduce__(self): return BuiltAndFilled, (3,), None, None, iter(self.items())
class Slots:
    __slots__ = ("a",)
    def __init__(self): self.a = 1
""", module.__dict__)
    for x in vars(module).values():
        if isinstance(x, type): x.__module__ = "theirs"
    monkeypatch.setitem(sys.modules, "theirs", module)
    return module


@pytest.fixture(autouse=True)
def quiet(monkeypatch): monkeypatch.setenv("CION_NB_PROGRESS", "0")


@pytest.fixture(scope="session", autouse=True)
def renderers():
    "Where a server of forks holds the scenes of the embedded worlds, it draws them."
    if not os.environ.get("CION_NB_FORKS"): return
    import forked

    from cion_nb.data import film
    film.sys = types.SimpleNamespace(executable=forked.executable())


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    "12 people of two colours each, 2 cameras, 4 images a camera; the parquet file of their table."
    root, rng, rows = tmp_path_factory.mktemp("people"), np.random.default_rng(0), []
    for pid in range(1, 13):
        top, bottom = rng.integers(0, 255, (2, 3))
        for cam in (1, 2):
            for k in range(4):
                x = np.empty((64, 32, 3))
                x[:32], x[32:] = top, bottom
                x = np.clip(x * (1 if cam == 1 else .7) + rng.normal(0, 12, x.shape), 0, 255).astype(np.uint8)
                path = f"{pid}_{cam}_{k}.png"
                Image.fromarray(x).save(root / path)
                split = "train" if pid <= 8 else "query" if k == 0 else "gallery"
                rows.append(dict(path=path, pid=pid, camid=cam, tracklet=10 * pid + cam, frame=k, split=split,
                                 video=f"v{cam}"))
    samples = make_samples(**{k: [r[k] for r in rows] for k in rows[0]}).assign(true_pid=[r["pid"] for r in rows])
    write_samples(samples, root / "samples.parquet")
    return root / "samples.parquet"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "An empty folder of runs, which recipes of this test go to."
    monkeypatch.setenv("CION_NB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


# Seconds of every test and why it is marked slow, into the file that .ci/test.py names.

TIMES = {}


def pytest_runtest_makereport(item, call):
    mark = item.get_closest_marker("slow")
    seconds, _ = TIMES.get(item.nodeid, (0, None))
    TIMES[item.nodeid] = (seconds + call.duration, None if mark is None else " ".join(mark.args) or "slow")


def pytest_sessionfinish():
    if file := os.environ.get("CION_NB_TEST_TIMES"): Path(file).write_text(json.dumps(TIMES), encoding="utf-8")

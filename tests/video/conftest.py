"""Fixtures of the tests of video."""
import numpy as np
import pytest
from PIL import Image

from cion_nb.core.samples import make_samples, write_samples

N, FRAMES = 8, 6     # people, frames of a tracklet


@pytest.fixture(scope="session")
def walkers(tmp_path_factory):
    """Tracklets of eight people in two cameras: four train, four are tested; a person has a colour, a camera a light.
    Two tracklets a camera; the first of a test person in camera 0 is a query."""
    root, rows, rng = tmp_path_factory.mktemp("walkers"), [], np.random.default_rng(0)
    colours = rng.integers(40, 216, (N, 3))
    for pid in range(N):
        for camid in (0, 1):
            for part in (0, 1):
                split = "train" if pid < N // 2 else "query" if camid == part == 0 else "gallery"
                for frame in range(FRAMES):
                    pixels = rng.integers(-30, 30, (32, 16, 3)) + colours[pid] + 20 * camid
                    name = f"{pid}_{camid}_{part}_{frame}.png"
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name)
                    rows.append(dict(path=name, pid=pid, camid=camid, video=f"c{camid}", frame=frame, split=split,
                                     tracklet=2 * (2 * pid + camid) + part))
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    write_samples(make_samples(**columns), root / "samples.parquet")
    return root / "samples.parquet"

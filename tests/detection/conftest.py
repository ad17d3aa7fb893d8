"""Fixtures of the tests of detection."""
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cion_nb.core.samples import write_samples
from cion_nb.data.scenes import make_scenes

VIDEOS, FRAMES, SIZE = 6, 6, (64, 96)


@pytest.fixture(scope="session")
def street(tmp_path_factory):
    """Six videos of six frames, two people each of one colour who walk; the last two videos are the test's. A crowd is
    ignored in the first video, the second begins with nobody. The parquet file of the scenes table."""
    root, rng, parts = tmp_path_factory.mktemp("street"), np.random.default_rng(0), []
    for v in range(VIDEOS):
        ground, colours = rng.integers(60, 120, (*SIZE, 3)), rng.integers(0, 256, (2, 3))
        for f in range(FRAMES):
            picture, boxes = ground.copy(), []
            for k in range(2):
                x, y, w, h = 8 + 8 * f + 34 * k, 20 - 8 * k, 12, 36
                picture[y:y + h, x:x + w] = colours[k]
                boxes.append((x, y, w, h))
            name = f"v{v}_{f}.png"
            Image.fromarray(picture.astype(np.uint8)).save(root / name)
            common = dict(video=f"v{v}", camid=v % 2, frame=2 * f, split="gallery" if v >= 4 else "train")
            if (v, f) == (1, 0): parts.append(make_scenes([name], np.zeros((1, 4)), True, **common))
            else:
                who = [2 * v, 2 * v + 1]
                parts.append(make_scenes([name] * 2, boxes, pid=who, tracklet=who, **common))
            if v == 0: parts.append(make_scenes([name], [[80, 0, 14, 60]], True, **common))
    write_samples(pd.concat(parts, ignore_index=True), root / "frames.parquet")
    return root / "frames.parquet"

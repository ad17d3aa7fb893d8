"""A drawn street of walking rectangles, and the detector that finds them."""
import time

import numpy as np
import pandas as pd
import pytest

from cion_nb.data.detectors import MOT_COLUMNS

cv2 = pytest.importorskip("cv2", reason="needs the extra [track]")
COLOURS = [(40, 40, 220), (40, 200, 40), (220, 60, 30), (30, 200, 220)]   # BGR
N, W, H = 90, 320, 240


def box_at(person, frame):
    "Left, top, width, height of a walking rectangle, or None once it has left."
    x = (10 + 2.5 * frame) if person % 2 == 0 else (W - 40 - 2.5 * frame)
    return (int(x), 10 + 55 * person, 24, 54 - 4 * person) if -10 < x < W - 14 else None


def write_street(path, n=N, people=4, fourcc="MJPG", seed=0):
    "A video of coloured rectangles over noise, and its truth (frames from 0)."
    back = np.random.default_rng(seed).integers(90, 120, (H, W, 3), np.uint8)
    video, rows = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 15, (W, H)), []
    assert video.isOpened()
    for f in range(n):
        frame = back.copy()
        for p in range(people):
            if (box := box_at(p, f)) is None: continue
            x, y, w, h = box
            frame[y:y + h, max(x, 0):x + w] = COLOURS[p]
            rows.append((f, p + 1, x, y, w, h, 1, -1, -1))
        video.write(frame)
    video.release()
    return pd.DataFrame(rows, columns=list(MOT_COLUMNS))


class ColourDetector:
    "Finds the rectangles by their colour: a detector as a user would write one."
    calls = 0
    def __init__(self, pause=0.0): self.pause, self.settings = pause, dict(detector="colour")
    def detect(self, frames):
        self.calls += len(frames)
        time.sleep(self.pause * len(frames))
        return [self._one(f) for f in frames]
    def _one(self, frame):
        boxes = []
        for colour in COLOURS:
            near = (np.abs(frame.astype(int) - colour).max(-1) < 60).astype(np.uint8)
            x, y, w, h = cv2.boundingRect(near)
            if w > 8 and h > 20: boxes.append((x, y, x + w, y + h))
        return np.array(boxes, float).reshape(-1, 4), np.full(len(boxes), 0.9)


OPTIONS = dict(detector=ColourDetector(), min_height=20, tracker="bytetrack")


class Seeing(ColourDetector):
    "Rectangles with a vector of their colour, of the frame and of the place, so that no two are equal to the bit."
    def __init__(self, width=6, **more):
        super().__init__(**more)
        self.embed_dim, self.settings = width, dict(detector="seeing")
    def _one(self, frame):
        boxes, scores = super()._one(frame)
        middle = [frame[int(t) + 5:int(b) - 5, max(int(l), 0):max(int(r), 1)].mean((0, 1)) for l, t, r, b in boxes]
        noise = np.random.default_rng(int(frame[:9].sum())).normal(size=(len(boxes), self.embed_dim))
        looks = .05 * noise
        if len(boxes): looks[:, :3] += (np.array(middle) - 110) / 60
        return boxes, scores, looks


LOOK = dict(detector=Seeing(), min_height=20, tracker="embedding")

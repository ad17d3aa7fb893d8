"""FairMOT's solver written out: lists of tracks, a Kalman filter of 8 x 8 of the library `trackers`, all matchings."""
import math
from collections import Counter

import numpy as np
from trackers.utils.kalman_filter import KalmanFilter


def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def best_matching(cost, limit):
    "Of all ways to pair rows and columns the cheapest, where each that stays alone costs half the limit (lapjv)."
    n, m = len(cost), len(cost[0]) if cost else 0
    best = [math.inf, []]
    def go(row, used, pairs, price):
        if price >= best[0]: return
        if row == n:
            price += limit / 2 * (m - len(used))
            if price < best[0]: best[:] = price, list(pairs)
            return
        go(row + 1, used, pairs, price + limit / 2)
        for column in range(m):
            if column not in used and math.isfinite(cost[row][column]):
                go(row + 1, used | {column}, [*pairs, (row, column)], price + cost[row][column])
    go(0, frozenset(), [], 0.)
    return best[1]


class Track:
    def __init__(self, box, look, frame):
        self.kf = KalmanFilter(8, 4)
        self.kf.transition_mtx, self.kf.observation_mtx = np.eye(8) + np.eye(8, k=4), np.eye(4, 8)
        z, h = measured(box), box[3] - box[1]
        self.kf.state = np.array([*z, 0, 0, 0, 0], float)[:, None]
        std = [h / 10, h / 10, 1e-2, h / 10, h / 16, h / 16, 1e-5, h / 16]
        self.kf.state_covariance = np.diag(np.square(std))
        self.look, self.first, self.last, self.id, self.state = look, frame, frame, -1, "tracked"

    @property
    def height(self): return self.kf.state[3, 0]

    @property
    def box(self):
        x, y, a, h = self.kf.state[:4, 0]
        return x - a * h / 2, y - h / 2, x + a * h / 2, y + h / 2

    def predict(self):
        if self.state == "lost": self.kf.state[7] = 0
        h = self.height
        std = [h / 20, h / 20, 1e-2, h / 20, h / 160, h / 160, 1e-5, h / 160]
        self.kf.process_noise = np.diag(np.square(std))
        self.kf.predict()

    def measure(self): return np.diag(np.square([self.height / 20, self.height / 20, 1e-1, self.height / 20]))

    def distance(self, box):
        S = self.kf.state_covariance[:4, :4] + self.measure()
        off = measured(box) - self.kf.state[:4, 0]
        return off @ np.linalg.inv(S) @ off

    def update(self, box, look, frame, momentum):
        self.kf.measurement_noise = self.measure()
        self.kf.update(measured(box))
        mean = [momentum * a + (1 - momentum) * b for a, b in zip(self.look, look)]
        self.look = np.array(mean) / math.sqrt(sum(a * a for a in mean))
        self.last, self.state = frame, "tracked"


def measured(box):
    l, t, r, b = box
    return np.array([(l + r) / 2, (t + b) / 2, (r - l) / (b - t), b - t])


class SlowTracker:
    "`happened` counts what the scenes made it do, so that a test can ask whether they asked for anything."
    def __init__(self, frame_rate=30., keep=.4, birth=.6, appearance=.98, match=.4, overlap=.5, young=.7, momentum=.9,
                 buffer=30, duplicate=.85, min_area=100., widest=1.6):
        vars(self).update({k: v for k, v in locals().items() if k != "self"})
        self.wait, self.frame, self.next, self.happened = max(1, int(buffer * frame_rate / 30)), 0, 0, Counter()
        self.tracked, self.lost = [], []

    def pair(self, tracks, dets, cost, limit, what):
        pairs = best_matching([[cost(t, d) for d in dets] for t in tracks], limit)
        for r, c in pairs:
            (box, _, look, place), track = dets[c], tracks[r]
            self.happened[what + (" again" if track.state == "lost" else "")] += 1
            track.update(box, look, self.frame, self.momentum)
            if track.id < 0: track.id, self.next = self.next, self.next + 1
            self.at[place] = track
        return ([t for i, t in enumerate(tracks) if i not in {r for r, _ in pairs}],
                [d for i, d in enumerate(dets) if i not in {c for _, c in pairs}])

    def update(self, boxes, scores, looks):
        self.frame, self.at = self.frame + 1, {}
        dets = [(b, s, np.array(f) / np.linalg.norm(f), i)
                for i, (b, s, f) in enumerate(zip(boxes, scores, looks)) if s >= self.keep]
        counted, young = ([t for t in self.tracked if (t.id >= 0) == is_counted] for is_counted in (True, False))
        pool = counted + self.lost
        for t in pool: t.predict()
        def by_overlap(t, d): return 1 - iou(t.box, d[0])
        def by_look(t, d):
            far, cosine = t.distance(d[0]), max(0., 1 - sum(a * b for a, b in zip(t.look, d[2])))
            return math.inf if far > 9.4877 else self.appearance * cosine + (1 - self.appearance) * far
        left, dets = self.pair(pool, dets, by_look if self.appearance else by_overlap, self.match, "first")
        left, dets = self.pair([t for t in left if t.state == "tracked"], dets, by_overlap, self.overlap, "overlap")
        for t in left: t.state = "lost"
        forgotten, dets = self.pair(young, dets, by_overlap, self.young, "young")
        self.happened["forgotten"] += len(forgotten)
        new = []
        for box, score, look, place in dets:
            if score < self.birth: continue
            new.append(Track(box, look, self.frame))
            if self.frame == 1: new[-1].id, self.next = self.next, self.next + 1
            self.at[place] = new[-1]
        everybody = [t for t in [*pool, *young] if t not in forgotten] + new
        self.tracked = [t for t in everybody if t.state == "tracked"]
        self.lost = [t for t in everybody if t.state == "lost" and self.frame - t.last <= self.wait]
        self.happened["given up"] += sum(t.state == "lost" for t in everybody) - len(self.lost)
        self.drop_copies()
        return [self.at[i].id if i in self.at and self.at[i] in self.tracked and self.shown(b) else -1
                for i, b in enumerate(boxes)]

    def drop_copies(self):
        here, gone = set(), set()
        for a in self.tracked:
            for b in self.lost:
                if iou(a.box, b.box) <= self.duplicate: continue
                if a.last - a.first > b.last - b.first: gone.add(id(b))
                else: here.add(id(a))
        self.happened["copies of tracked"], self.happened["copies of lost"] = (
            self.happened["copies of tracked"] + len(gone), self.happened["copies of lost"] + len(here))
        self.tracked = [t for t in self.tracked if id(t) not in here]
        self.lost = [t for t in self.lost if id(t) not in gone]

    def shown(self, box):
        w, h = box[2] - box[0], box[3] - box[1]
        return w * h >= self.min_area and w <= self.widest * h

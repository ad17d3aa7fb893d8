"""The solver as a solver: oracle, occlusions, thresholds, memory, gaps, odd frames."""
from collections import Counter

import numpy as np
import pytest

from cion_nb.data.association import assign, BoxFilter, EmbeddingTracker
from cion_nb.data.tracking import create_tracker

pytest.importorskip("trackers", reason="needs the extra [track]")
from slow_tracker import best_matching, measured, SlowTracker, Track
from supervision import Detections


def seen(boxes, looks=None, scores=.9):
    boxes = np.array(boxes, float).reshape(-1, 4)
    scores = np.broadcast_to(np.float32(scores), len(boxes)).copy()
    return Detections(xyxy=boxes, confidence=scores, data={} if looks is None else {"embedding": np.asarray(looks)})


def box(x, y=100., w=40., h=100.): return x, y, x + w, y + h


def one_hot(people, width=16): return np.eye(width, dtype=np.float32)[np.array(people, int)].reshape(-1, width)


def run(tracker, frames):
    "(person, id) of every box, frame by frame; frames are lists of (person, box) or (person, box, score)."
    out = []
    for frame in frames:
        people, boxes, *scores = zip(*frame) if frame else ((), ())
        looks = one_hot(people) if frame else np.zeros((0, 16))
        ids = tracker.update(seen(boxes, looks, *scores)).tracker_id
        out.append(list(zip(people, ids.tolist())))
    return out


def ids_of(result):
    "The ids that each person had, -1 left out."
    out = {}
    for frame in result:
        for person, i in frame:
            if i >= 0: out.setdefault(person, []).append(i)
    return {p: sorted(set(i)) for p, i in out.items()}


# ---------------------------------------------------------------- the slow tracker

def random_scene(seed, n=14):
    "People who walk, stop, hide behind each other and come back; false boxes, boxes that shrink, odd scores."
    rng = np.random.default_rng(seed)
    k, scene = int(rng.integers(1, 5)), []
    at, way = rng.uniform([0, 80], [160, 140], (k, 2)), rng.normal(0, [7, 1.5], (k, 2))
    size, looks = rng.uniform([30, 80], [45, 120], (k, 2)), rng.normal(size=(k, 6))
    if k > 1 and rng.random() < .5: looks[1] = looks[0] + .3 * rng.normal(size=6)            # two look alike
    for _ in range(n):
        at += way + rng.normal(0, 1.5, (k, 2))
        way = np.where(rng.random((k, 1)) < .1, -way, way)
        boxes, scores, vectors = [], [], []
        for p in range(k):
            for _ in range(int(rng.choice(3, p=[.25, .7, .05]))):                            # missed, once, twice
                x, y, w, h = *(at[p] + rng.normal(0, 1, 2)), *(size[p] * rng.uniform(.9, 1.1, 2))
                boxes.append((x, y, x + w, y + h))
                scores.append(rng.choice([.3, .5, .65, .9]) + rng.uniform(-.04, .04))
                vectors.append(looks[p] + rng.normal(0, .45, 6))
        if rng.random() < .2:
            x, y, w, h = *rng.uniform(0, 160, 2), *rng.choice([[4, 9], [90, 40], [40, 100]])
            boxes.append((x, y, x + w, y + h))
            scores.append(rng.uniform(.3, 1))
            vectors.append(rng.normal(size=6))
        scene.append((boxes, np.float32(scores), vectors))
    return scene


@pytest.mark.slow("tries all matchings of some hundred scenes")
@pytest.mark.parametrize("appearance", [.98, .5, 0])
def test_it_gives_the_ids_of_the_slow_tracker(appearance):
    happened = Counter()
    for seed in range(150):
        rng = np.random.default_rng(1000 + seed)
        settings = dict(appearance=appearance, frame_rate=float(rng.choice([5, 30, 60])), momentum=rng.choice([.9, .5]),
                        buffer=int(rng.choice([2, 30])), duplicate=rng.choice([.85, .6]))
        fast, slow = EmbeddingTracker(**settings), SlowTracker(**settings)
        for t, (boxes, scores, looks) in enumerate(random_scene(seed)):
            got = fast.update(seen(boxes, np.array(looks).reshape(-1, 6), scores)).tracker_id
            assert got.tolist() == slow.update(boxes, scores, looks), (seed, t, settings)
        happened += slow.happened
    wanted = ["first", "first again", "overlap", "young", "forgotten", "given up", "copies of lost",
              "copies of tracked"]
    if not appearance: wanted = wanted[:-2]                            # a lost track takes what lies on it in step 1
    assert all(happened[what] > 5 for what in wanted), happened


@pytest.mark.parametrize("seed", range(40))
def test_assignments_are_lapjv_s(seed):
    rng = np.random.default_rng(seed)
    cost = rng.uniform(0, 1, rng.integers(1, 6, 2))
    cost[rng.random(cost.shape) < .2] = np.inf
    limit = rng.uniform(.2, .9)
    assert sorted(zip(*map(np.ndarray.tolist, assign(cost, limit)))) == best_matching(cost.tolist(), limit)


def test_the_filter_is_the_library_s_of_8_by_8():
    rng, filters, at = np.random.default_rng(0), BoxFilter(), np.array([box(50), box(200, h=220., w=70.)])
    plain, (mean, var) = [Track(b, None, 0) for b in at], filters.begin(np.array([measured(b) for b in at]))
    for t in range(30):
        at = at + rng.normal(0, 3, at.shape) + [[4, 0, 4, 0], [-2, 1, -2, 1]]
        z = np.array([measured(b) for b in at])
        for track in plain: track.predict()
        mean, var = filters.predict(mean, var)
        far = [[track.distance(b) for b in at] for track in plain]
        np.testing.assert_allclose(filters.distance(mean, var, z), far, rtol=1e-9, atol=1e-9)
        if t % 4 == 3: continue                                                              # nobody is seen
        for track, b in zip(plain, at):
            track.kf.measurement_noise = track.measure()
            track.kf.update(measured(b))
        mean, var = filters.correct(mean, var, z)
        np.testing.assert_allclose(mean.reshape(2, 8), [t.kf.state[:, 0] for t in plain], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- who is who

def crossing(n=60, hidden=range(22, 36), turn=False):
    "Perfect boxes of two people who meet; the one behind is hidden. They pass each other, or turn round."
    for t in range(n):
        way = 3 * (min(t, n - 1 - t) if turn else t)
        a, b = (0, box(20. + way)), (1, box(200. - way))
        yield [a] if t in hidden and not turn else [] if t in hidden else [a, b]


def test_no_switch_through_an_occlusion_where_overlap_alone_switches():
    scene = list(crossing(n=60, hidden=range(22, 38), turn=True))
    assert ids_of(run(EmbeddingTracker(), scene)) == {0: [0], 1: [1]}
    without = ids_of(run(EmbeddingTracker(appearance=0), scene))
    assert without[0] == without[1] == [0, 1]


def test_no_switch_where_somebody_is_hidden_behind_the_other():
    "She is farther away. Of the same size she would lie on him exactly, and be taken for a copy of him (FairMOT)."
    far = [[(p, box(b[0], 120., 32., 80.) if p else b) for p, b in frame] for frame in crossing()]
    assert ids_of(run(EmbeddingTracker(), far)) == {0: [0], 1: [1]}
    assert ids_of(run(EmbeddingTracker(), crossing())) == {0: [0], 1: [1, 2]}
    assert ids_of(run(EmbeddingTracker(duplicate=1.), crossing())) == {0: [0], 1: [1]}


def test_a_tracker_that_does_not_look_at_embeddings_fails_here():
    "The same boxes with the names of the two exchanged after the meeting: the ids must follow the looks."
    scene = list(crossing(turn=True))
    swapped = [[(1 - p, b) for p, b in frame] if t > 30 else frame for t, frame in enumerate(scene)]
    ids = [[{p: i for p, i in run(EmbeddingTracker(), s)[-1]} for s in (scene, swapped)]]
    assert ids == [[{0: 0, 1: 1}, {0: 0, 1: 1}]]
    alike = [[(0, b) for _, b in frame] for frame in scene]
    of_boxes = [i for _, i in run(EmbeddingTracker(), scene)[-1]], [i for _, i in run(EmbeddingTracker(), swapped)[-1]]
    assert of_boxes[0] == of_boxes[1][::-1] and [i for _, i in run(EmbeddingTracker(), alike)[-1]] != of_boxes[0]


def test_appearance_0_is_a_solver_that_gets_no_embeddings():
    for seed in range(20):
        results = []
        for looks in ("given", "others", None):
            tracker, rng = EmbeddingTracker(appearance=0), np.random.default_rng(seed)
            results.append([tracker.update(seen(b, {"given": np.array(x).reshape(-1, 6), None: None, "others":
                                                    rng.normal(size=(len(b), 6))}[looks], s)).tracker_id.tolist()
                            for b, s, x in random_scene(seed)])
        assert results[0] == results[1] == results[2]


def test_a_look_is_the_mean_of_a_track_s_looks():
    "A person who changes slowly is followed through a gap, one who changes at once is not."
    def person(turn): return [np.cos(turn), np.sin(turn)]
    for turns, stays in (([0, 0, 0, .3, .3, .3], True), ([0, 0, 0, 0, 0, 1.2], False)):
        tracker, ids = EmbeddingTracker(overlap=0.), []
        for t in turns: ids += tracker.update(seen([box(50)], [person(t)])).tracker_id.tolist()
        ids += tracker.update(seen([box(50)], [person(turns[-1])])).tracker_id.tolist()
        assert (ids[-1] == 0) == stays, ids
    tracker = EmbeddingTracker()
    for turn in (0, .5, .5): tracker.update(seen([box(50)], [person(turn)]))
    want = np.array(person(0))
    for _ in range(2):
        want = .9 * want + .1 * np.array(person(.5))
        want /= np.linalg.norm(want)
    np.testing.assert_allclose(tracker._tracks.look[0], want, atol=1e-6)


def test_the_gate_keeps_apart_what_looks_alike_and_is_far_away():
    frames = [[(0, box(50))]] * 5
    assert ids_of(run(EmbeddingTracker(), [*frames, [(0, box(500))], [(0, box(500))]]))[0] == [0, 1]
    assert ids_of(run(EmbeddingTracker(gate=1e6, appearance=1.), [*frames, [(0, box(500))]]))[0] == [0]


# ---------------------------------------------------------------- thresholds and memory

def test_boxes_of_middling_score_continue_tracks_and_begin_none():
    scored = [[(0, box(50 + 2 * t), s)] for t, s in enumerate([.9, .5, .41, .59, .5])]
    assert [f[0][1] for f in run(EmbeddingTracker(), scored)] == [0] * 5
    assert ids_of(run(EmbeddingTracker(), [[(0, box(50), .59)]] * 9)) == {}
    assert ids_of(run(EmbeddingTracker(birth=.4), [[(0, box(50), .59)]] * 9)) == {0: [0]}        # FairMOT's own
    assert ids_of(run(EmbeddingTracker(), [[(0, box(50), .9)], [(0, box(50), .39)]])) == {0: [0]}
    assert run(EmbeddingTracker(), [[(0, box(50), .9)], [(0, box(50), .39)]])[1] == [(0, -1)]


@pytest.mark.parametrize("name, value", [("birth", .6), ("keep", .4)])
def test_a_score_on_the_threshold_counts(name, value):
    for score, counts in ((value, True), (np.nextafter(np.float32(value), np.float32(0)), False)):
        tracker = EmbeddingTracker(birth=value, keep=.4)
        assert (tracker.update(seen([box(50)], one_hot([0]), score)).tracker_id.tolist() == [0]) == counts


def test_after_the_first_frame_a_track_counts_from_its_second_match():
    frame = [(0, box(50))]
    assert run(EmbeddingTracker(), [frame] * 2) == [[(0, 0)], [(0, 0)]]
    assert run(EmbeddingTracker(), [[], *[frame] * 3]) == [[], [(0, -1)], [(0, 0)], [(0, 0)]]
    assert run(EmbeddingTracker(), [[], frame, [], frame, frame])[1:] == [[(0, -1)], [], [(0, -1)], [(0, 0)]]


@pytest.mark.parametrize("fps, buffer, missed", [(30, 30, 30), (15, 30, 15), (7, 30, 7), (29, 30, 29), (60, 30, 60),
                                                 (30, 5, 5), (1, 30, 1), (.5, 30, 1), (30, 0, 0)])
def test_a_lost_track_is_waited_for_as_long_as_the_buffer(fps, buffer, missed):
    def after(gap): return run(create_tracker("embedding", fps, buffer=buffer),
                               [[(0, box(50))], *[[]] * gap, *[[(0, box(50))]] * 2])[-1]
    assert after(missed) == [(0, 0)] and after(missed + 1) == [(0, 1)]


def test_a_lost_track_comes_back_by_its_looks_and_not_by_overlap():
    gone = [[]] * 8
    scene = [[(0, box(50))], *gone, *[[(1, box(50))]] * 2]
    assert ids_of(run(EmbeddingTracker(duplicate=1.), scene)) == {0: [0], 1: [1]}
    assert ids_of(run(EmbeddingTracker(duplicate=1., appearance=0), scene)) == {0: [0], 1: [0]}


def test_of_two_tracks_on_each_other_the_older_stays():
    "A track that begins where a lost one is expected is a copy of it, until the lost one is given up."
    result = run(EmbeddingTracker(buffer=3), [*[[(0, box(50))]] * 5, [(1, box(50))]])
    assert result[-1] == [(1, 0)]                                           # by overlap, as it is not lost yet
    result = run(EmbeddingTracker(buffer=3), [*[[(0, box(50))]] * 5, [], *[[(1, box(50))]] * 6])
    assert [i for (_, i), in result[6:]] == [-1, -1, -1, 1, 1, 1]


def test_what_is_too_small_or_too_wide_is_followed_and_not_shown():
    frames = [[(0, box(50, w=9., h=11.1))]] * 3
    assert ids_of(run(EmbeddingTracker(), frames)) == {}
    assert ids_of(run(EmbeddingTracker(min_area=90.), frames)) == {0: [0]}
    assert ids_of(run(EmbeddingTracker(min_area=100.), [[(0, box(50, w=10., h=10.))]] * 2)) == {0: [0]}
    wide = [[(0, box(50, w=161., h=100.))]] * 3
    assert ids_of(run(EmbeddingTracker(), wide)) == {}
    assert ids_of(run(EmbeddingTracker(widest=2.), wide)) == {0: [0]}


# ---------------------------------------------------------------- odd frames

def test_frames_without_boxes_and_with_one():
    tracker = EmbeddingTracker()
    for detections in (Detections.empty(), seen([], np.zeros((0, 4))), seen([])):
        out = tracker.update(detections)
        assert len(out) == 0 and out.tracker_id.tolist() == []
    assert tracker.update(seen([box(50)], one_hot([0]))).tracker_id.tolist() == [-1]
    assert tracker.update(seen([box(50)], one_hot([0]))).tracker_id.tolist() == [0]


def test_rows_come_back_as_they_came_and_the_input_stays():
    boxes = [box(300), box(20), box(20, w=0.), box(90, h=-9.), box(100)]
    given = seen(boxes, one_hot([0, 1, 2, 3, 4]), [.9, .9, .9, .9, .3])
    given.data["row"] = np.arange(5)
    before, tracker = given.xyxy.copy(), EmbeddingTracker()
    out = tracker.update(given, frame=np.zeros((4, 4, 3), np.uint8))
    assert out.tracker_id.tolist() == [0, 1, -1, -1, -1] and out.data["row"].tolist() == [0, 1, 2, 3, 4]
    assert given.tracker_id is None and np.array_equal(given.xyxy, before)
    tracker.reset()
    assert tracker.update(given).tracker_id.tolist() == [0, 1, -1, -1, -1]


def test_without_scores_all_boxes_count():
    assert EmbeddingTracker(appearance=0).update(Detections(xyxy=np.array([box(5)]))).tracker_id.tolist() == [0]


def test_ten_thousand_boxes_in_a_frame_leave_the_best():
    rng, n = np.random.default_rng(0), 10_000
    at = rng.uniform(0, 1000, (n, 2))
    given = seen(np.hstack([at, at + [30, 60]]), rng.normal(size=(n, 32)), rng.random(n))
    ids = EmbeddingTracker().update(given).tracker_id
    assert (ids >= 0).sum() == 500 and given.confidence[ids >= 0].min() >= np.sort(given.confidence)[-500]


@pytest.mark.parametrize("looks, message", [
    (None, r"no data\[.embedding.\]: take a detector that embeds .*EmbeddedDetector\(detector, model\)"),
    (np.ones((2, 8)), "embeddings of width 8, after others of width 16"),
    (np.ones(2), r"embeddings \(2,\) of 2 boxes"),
    (np.array([[1.] * 16, [np.nan] * 16]), "1 of 2 embeddings are not finite or all zero, first: box 1"),
    (np.array([[0.] * 16, [1.] * 16]), "first: box 0"),
])
def test_embeddings_that_are_of_no_use_are_named_and_change_nothing(looks, message):
    tracker, frame = EmbeddingTracker(), [box(50), box(200)]
    tracker.update(seen(frame, one_hot([0, 1])))
    with pytest.raises(ValueError, match=message): tracker.update(seen(frame, looks))
    assert tracker.update(seen(frame, one_hot([0, 1]))).tracker_id.tolist() == [0, 1]
    assert EmbeddingTracker(appearance=0).update(seen(frame, looks if looks is None or looks.ndim == 2 else None)
                                                 ).tracker_id.tolist() == [0, 1]


@pytest.mark.parametrize("wrong, message", [
    (dict(frame_rate=0), "frame_rate=0: must be above 0"), (dict(appearance=1.1), "from 0 to 1"),
    (dict(keep=-.1), "keep=-0.1"), (dict(birth=.3), "birth=0.3 is below keep=0.4"), (dict(momentum=1.), "momentum"),
    (dict(buffer=-1), "buffer=-1"), (dict(match="x"), "match='x': a number"), (dict(gate=float("nan")), "gate=nan"),
    (dict(most=True), "most=True"),
])
def test_settings_without_meaning(wrong, message):
    with pytest.raises(ValueError, match=message): EmbeddingTracker(**wrong)


def test_create_tracker_knows_it():
    tracker = create_tracker("Embedding", 12.5, match=.3)
    assert isinstance(tracker, EmbeddingTracker) and tracker.match == .3 and tracker.wait == 12
    with pytest.raises(ValueError, match="embedding: .*memory.*settings are keep, birth"):
        create_tracker("embedding", memory=3)
    with pytest.raises(ValueError, match="known: .*embedding"): create_tracker("deepsort")
    assert EmbeddingTracker().settings == EmbeddingTracker(30.).settings != EmbeddingTracker(25.).settings


def test_a_stride_is_a_lower_frame_rate():
    "Half the frames at half the rate wait for the same time, and give the same ids in an easy scene."
    scene = [[(0, box(20. + t)), (1, box(300. - t))] for t in range(80)]
    for t in range(20, 44): scene[t] = scene[t][:1]                                          # 24 frames without her
    whole, half = run(EmbeddingTracker(30.), scene), run(EmbeddingTracker(15.), scene[::2])
    assert ids_of(whole) == ids_of(half) == {0: [0], 1: [1]}
    assert ids_of(run(EmbeddingTracker(10.), scene[::2]))[1] == [1, 2]                       # 12 frames are too many

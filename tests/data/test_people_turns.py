"""Walks that change direction: constant speed, headings that are the way, and straight walks as they ever were."""
import numpy as np
import pytest

from cion_nb.data import film as P
from cion_nb.data.cameras import stream
from cion_nb.data.people import random_person, seen_from, TURN, Walk
from cion_nb.data.scenery import cameras

CAMERAS = [cam for bank in "AB" for cam in cameras(bank)]
WALKER = random_person(stream("walker"), 1)


def drawn(cam, n):
    "Walks through the view of a camera, and those of them that have room for a turn, with it."
    plain = [P._walk(stream("walk", cam.name, k), cam, 0, WALKER, 0) for k in range(n)]
    bent = [P._with_a_turn(stream("turn", cam.name, k), cam, walk) for k, walk in enumerate(plain)]
    return plain, [walk for walk in bent if walk is not None]


TURNING = {cam.name: drawn(cam, 40)[1] for cam in CAMERAS}


def where_before(walk, seconds):
    "`Walk.where` and `length` of before there were turns."
    a, b, c = (np.array(q) for q in walk.path)
    def bezier(t): return (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t ** 2 * c
    t = np.linspace(0, 1, 65)[:, None]
    steps = np.hypot(*np.diff(bezier(t), axis=0).T)
    d = np.asarray(seconds) * walk.speed
    t = np.interp(d, np.concatenate([[0], np.cumsum(steps)]), t[:, 0])[..., None]
    v = 2 * (1 - t) * (b - a) + 2 * t * (c - b)
    return bezier(t), np.arctan2(v[..., 1], v[..., 0]), d, float(steps.sum())


@pytest.mark.parametrize("cam", CAMERAS, ids=lambda cam: cam.name)
def test_straight_walks_are_what_they_were_to_the_bit(cam):
    for walk in drawn(cam, 20)[0]:
        seconds = np.arange(-1, walk.length / walk.speed + 1, 1 / 12)
        *there, length = where_before(walk, seconds)
        assert all(np.array_equal(now, was) for now, was in zip(walk.where(seconds), there, strict=True))
        assert walk.length == length and not walk.has_turned(seconds).any()


def around(angle):
    "Radians in (-pi, pi]."
    return np.angle(np.exp(1j * np.asarray(angle)))


@pytest.mark.parametrize("cam", CAMERAS, ids=lambda cam: cam.name)
def test_speed_is_constant_and_the_heading_is_the_way(cam):
    for walk in TURNING[cam.name]:
        before, angle, after = walk.turn
        seconds = np.linspace(0, walk.length / walk.speed, 4000)
        position, heading, walked = walk.where(seconds)
        step = np.diff(position, axis=0)
        pace = np.hypot(*step.T) / np.diff(seconds)
        bent = walked[:-1] > before                                            # before it the curve is as it ever was
        assert np.abs(pace[bent] / walk.speed - 1).max() < .01
        frames = walk.where(np.arange(0, walk.length / walk.speed, 1 / 12))[0]
        assert np.abs(np.hypot(*np.diff(frames, axis=0).T) * 12 / walk.speed - 1).max() < .01
        assert np.hypot(*step.T).max() < 2 * walk.length / 4000, "nobody jumps"
        heading = np.unwrap(heading)
        middle = (heading[1:] + heading[:-1]) / 2
        far = around(np.arctan2(step[:, 1], step[:, 0]) - middle)
        assert np.abs(far).max() < .02 and np.abs(np.diff(heading)).max() < .05
        assert np.isclose(walked[-1], walk.length) and walk.length == before + TURN * walk.speed + after
        ends = walk.where(np.array([before, before + TURN * walk.speed]) / walk.speed)[1]
        assert np.isclose(ends[1] - ends[0], angle), "it is over in half a second"


@pytest.mark.parametrize("cam", CAMERAS, ids=lambda cam: cam.name)
def test_a_turn_is_sharp_in_view_and_in_the_middle_third(cam):
    walks = TURNING[cam.name]
    assert len(walks) > 30, "nearly every way has room for a turn"
    for walk in walks:
        before, angle, after = walk.turn
        assert 60 <= np.degrees(abs(angle)) <= 150
        assert 1 / 3 <= (before + TURN * walk.speed / 2) / walk.length <= 2 / 3
        (x, y), (end_x, end_y) = walk.where(np.array([before, walk.length]) / walk.speed)[0]
        half = y * cam.size[0] / 2 / cam.focal
        assert abs(x) < half and cam.near < y < cam.far
        leaves = abs(end_x) > P._edge(cam, end_y) - .1
        assert leaves or end_y < cam.near - 1.1, "out by the side, or past the camera"
        turned = walk.length - after
        assert is_seen(cam, walk, before - 1, before) and is_seen(cam, walk, turned, turned + .9)
    assert len({np.sign(walk.turn[1]) for walk in walks}) == 2, "to both sides"


def is_seen(cam, walk, first, last):
    "Whether most of the walker is in the picture from `first` to `last` metres of the way."
    pose = P._pose(WALKER, walk, np.linspace(first, last, 12) / walk.speed * 12, 12)
    low, high = np.split(P._boxes(cam, WALKER, pose), 2, axis=1)
    inside = (np.clip(high, 0, cam.size) - np.clip(low, 0, cam.size)).prod(1) / (high - low).prod(1)
    return inside.min() > .5


@pytest.mark.parametrize("cam", CAMERAS, ids=lambda cam: cam.name)
def test_people_are_seen_from_another_side_after_a_turn(cam):
    moved = []
    for walk in TURNING[cam.name]:
        moment = walk.turn[0] / walk.speed + np.array([-.4, TURN + .4])
        position, heading, walked = walk.where(moment)
        before, after = (view["yaw"] for view in seen_from(cam, WALKER, position, heading, walked))
        moved.append(np.degrees(abs(around(after - before))))
        assert walk.has_turned(moment).tolist() == [False, True]
    assert min(moved) > 30 and np.mean(moved) > 70


def test_has_turned_changes_in_the_middle_of_the_turn():
    walk = Walk(0, 0, ((-4., 8.), (0., 8.), (4., 8.)), 1.25, 0., (4., np.radians(90), 3.))
    middle = 4 / 1.25 + TURN / 2
    assert walk.has_turned([0, middle - .01, middle + .01, 99]).tolist() == [False, False, True, True]
    assert np.allclose(np.degrees(walk.where([middle])[1]), 45)
    position, heading, _ = walk.where(np.array([4 / 1.25 + TURN, walk.length / walk.speed, 99.]))
    radius = TURN * 1.25 / np.radians(90)
    assert np.allclose(position, [(radius, 8 + radius), (radius, 11 + radius), (radius, 11 + radius)], atol=1e-3)
    assert np.allclose(np.degrees(heading), 90), "by hand: to the right, then away from us"


def test_companions_turn_together():
    for cam in CAMERAS[::3]:
        for k, walk in enumerate(TURNING[cam.name][:10]):
            other = P._beside(stream("beside", k), walk, 7)
            seconds = np.arange(0, walk.length / walk.speed, 1 / 12)
            (one, heading, _), (two, too, _) = walk.where(seconds), other.where(seconds)
            apart = two - one
            assert np.allclose(heading, too) and np.allclose(apart, apart[0]) and .5 < np.hypot(*apart[0]) < .85
            assert other.person == 7 and other.turn == walk.turn and other.length == walk.length


def videos(turns, **changes):
    return P._cast("tiny", 0, P.PROFILES["tiny"] | dict(turns=turns) | changes).videos


@pytest.mark.parametrize("turns", [.3, .6, 1.])
def test_the_share_of_walks_with_a_turn(turns):
    walks = [walk for v in videos(turns, company=0) for walk in v.walks]
    share = np.mean([bool(walk.turn) for walk in walks])
    assert abs(share - turns) < .05 and len(walks) > 500
    assert abs(np.mean([bool(w.turn) for v in videos(turns, company=.5) for w in v.walks]) - turns) < .1


def test_a_clip_of_a_turning_walk_has_its_frames():
    few = dict(pretrain_people=0, train_people=8, test_people=8, images_per_camera=0, train_images_per_camera=0,
               distractors=0, turns=1., clip_frames=12)
    world = P.make_world("tiny", 1, **few)
    assert all(walk.turn and walk.length >= P._metres_of_a_clip(world.values) for v in world.videos for walk in v.walks)
    assert world.clips[world.clips.pid > 0].groupby("tracklet").size().eq(12).all()


@pytest.mark.parametrize("turns", [-.1, 1.01, float("nan")])
def test_a_share_that_is_none_is_named(turns):
    with pytest.raises(ValueError, match=r"turns=.* must lie in \[0, 1"): P.make_world("tiny", 0, turns=turns)

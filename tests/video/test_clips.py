"""Clips of tracklets: chunks, tables, transforms and batches, against plain definitions."""
import warnings

import numpy as np
import pytest
import torch
from examples import picture, quiet, warned
from hypothesis import given, settings, strategies as st
from PIL import Image

from cion_nb.core.samples import make_samples
from cion_nb.models.architectures import InputSpec
from cion_nb.training.engine import loader, Position
from cion_nb.training.views import erase_boxes, normalise, resize, sample_draws
from cion_nb.video.clips import (
    by_tracklet,
    clip_input,
    Clips,
    ClipTransform,
    cut_in_time,
    restricted_random,
    tracklet_table,
    TrackletSampler,
)

torch.set_num_threads(1)


# ── which frames ──
def chunk(F, T, i, chunks):
    "The frames of chunk i, with repeats, by the definition."
    if chunks == "equal": return list(range(i * F // T, (i + 1) * F // T)) or [i * F // T]
    length = -(-F // T)
    filled = list(range(F)) + [F - 1] * (length * T - F)
    return filled[i * length:(i + 1) * length]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 70), st.integers(1, 17), st.sampled_from(["equal", "ceil"]))
def test_every_frame_of_a_chunk_is_equally_likely(F, T, chunks):
    parts = [chunk(F, T, i, chunks) for i in range(T)]
    assert np.array_equal(restricted_random(F, T, chunks=chunks), [part[0] for part in parts])
    for i, part in enumerate(parts):
        n = 6 * len(part)
        u = np.full((n, T), .5)
        u[:, i] = (np.arange(n) + .5) / n                       # even steps through [0, 1)
        drawn = restricted_random(np.full(n, F), T, u, chunks)
        assert (np.diff(drawn) >= 0).all() and drawn.min() >= 0 and drawn.max() < F
        assert sorted(drawn[:, i]) == sorted(6 * part)
    if chunks == "equal" and F >= T: assert sum(parts, []) == list(range(F)), "chunks cut the tracklet without a gap"
    assert F >= T or set(restricted_random(F, T, chunks=chunks)) == set(range(F)), "a short tracklet shows all it has"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 99))
def test_many_tracklets_are_as_one_by_one(counts, T, seed):
    u = np.random.default_rng(seed).random((len(counts), T))
    for chunks in ("equal", "ceil"):
        many = restricted_random(counts, T, u, chunks)
        assert many.dtype == np.int64
        assert all(np.array_equal(a, restricted_random(F, T, v, chunks)) for a, F, v in zip(many, counts, u))
    almost = np.full((len(counts), T), np.nextafter(1, 0))
    assert (restricted_random(counts, T, almost) < np.asarray(counts)[:, None]).all()


@pytest.mark.parametrize("call, says", [
    (dict(n_frames=0, T=8), "without frames"), (dict(n_frames=[3, 0], T=8), "without frames"),
    (dict(n_frames=5, T=0), "T must be .*, got 0"), (dict(n_frames=5, T=2, chunks="half"), "equal, ceil"),
    (dict(n_frames=5, T=2, u=[.5, 1.]), "in .0, 1."), (dict(n_frames=5, T=2, u=["a", "b"]), "in .0, 1."),
    (dict(n_frames=5, T=2, u=[.5] * 3), r"shape \(3,\): T=2 numbers .*, \(2,\)"),
    (dict(n_frames=[5, 6, 7], T=2, u=np.zeros((2, 2))), r"shape \(2, 2\).*\(3, 2\)"),
    (dict(n_frames=2.5, T=2), "n_frames=2.5: whole numbers"), (dict(n_frames="5", T=2), "n_frames='5': whole numbers"),
    (dict(n_frames=[5, 2.5], T=2), "whole numbers"), (dict(n_frames=5, T=2.), "T must be .*, got 2.0")])
def test_what_cannot_be_sampled(call, says):
    with pytest.raises(ValueError, match=says): restricted_random(**call)


@pytest.mark.parametrize("F", range(1, 40))
def test_chunks_are_a_partition_where_the_docstring_says(F):
    for T in range(1, 18):
        for chunks, holds in (("equal", F >= T), ("ceil", F % T == 0)):
            parts = [chunk(F, T, i, chunks) for i in range(T)]
            assert (sum(parts, []) == list(range(F))) == holds, (T, chunks)
        if F < T:
            shown = np.bincount(restricted_random(F, T))
            assert shown.max() - shown.min() <= 1, "each about as often"
            assert np.bincount(restricted_random(F, T, chunks="ceil")).tolist() == [1] * (F - 1) + [T - F + 1]
    assert np.bincount(restricted_random(9, 8, np.full(8, .3), "ceil"))[8] == 4, "half of a clip is one frame"


# ── tables ──
@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=30), st.integers(0, 9))
def test_rows_are_sorted_and_told(places, seed):
    tracklet, frame = np.array(places).T
    samples = make_samples([f"{i}.png" for i in range(len(places))], pid=tracklet + 1, tracklet=tracklet, frame=frame)
    rows, said = warned(by_tracklet, samples)
    order = list(dict.fromkeys(tracklet))
    want = sorted(range(len(places)), key=lambda i: (order.index(tracklet[i]), frame[i]))
    assert rows.path.tolist() == [f"{i}.png" for i in want]
    falling = [t for t in order if (np.diff(frame[tracklet == t]) < 0).any()]
    assert bool(said) == bool(falling) and all(str(t) in said[0] for t in falling[:1])
    table = quiet(tracklet_table, samples)
    assert table.tracklet.tolist() == order and table.n_frames.sum() == len(rows)
    assert rows.path.iloc[table.first_row].tolist() == table.path.tolist()
    assert warned(by_tracklet, rows)[1] == []


def test_tracklets_of_two_people():
    samples = make_samples([f"{i}.png" for i in range(7)], pid=[1, 1, 2, 3, 4, 4, 3], tracklet=[0, 0, 0, 1, 1, 1, 1],
                           frame=range(7))
    with pytest.raises(ValueError, match="tracklet 0 has 2 values of pid"): tracklet_table(samples)
    table = tracklet_table(samples, mixed="most")
    assert table.pid.tolist() == [1, 3] and table.n_frames.tolist() == [3, 4], "of equals, the smallest"
    assert by_tracklet(samples, "most").pid.tolist() == [1] * 3 + [3] * 4
    with pytest.raises(ValueError, match="mixed='first'"): by_tracklet(samples, "first")
    with pytest.raises(ValueError, match="1 image has no tracklet"):
        tracklet_table(samples.assign(tracklet=[0] * 6 + [-1]))
    with pytest.raises(ValueError, match="tracklet 0 has 2 values of camid"):
        tracklet_table(samples.assign(camid=[0, 1] + [0] * 5), mixed="most")


# ── clips ──
@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    "Four tracklets of 1, 3, 9 and 20 frames of two people; their table."
    root, rows = tmp_path_factory.mktemp("crops"), []
    for t, n in enumerate((1, 3, 9, 20)):
        for k in range(n):
            path = f"{t}_{k:02}.png"
            image = picture(24 + k % 3, 12 + t, 50 * t + k).permute(1, 2, 0).contiguous()
            Image.fromarray(image.numpy()).save(root / path)
            rows.append(dict(path=path, pid=t // 2, tracklet=10 * t, frame=k))
    return root, make_samples(**{name: [row[name] for row in rows] for name in rows[0]})


def test_clips_of_one_frame_and_of_many(crops):
    root, samples = crops
    clips = Clips(samples, root, n_frames=4)
    assert len(clips) == 4 and clips.rows([0]).tolist() == [[0] * 4] and clips.rows([2]).tolist() == [[4, 6, 8, 10]]
    clip, = clips.load([3])
    assert all(torch.equal(a, clips.images[row]) for a, row in zip(clip, clips.rows([3])[0]))
    drawn = np.stack([clips.rows([1, 3], epoch) for epoch in range(50)])
    assert np.array_equal(drawn[7], clips.rows([1, 3], 7)) and len(np.unique(drawn[:, 1], axis=0)) > 40
    assert np.array_equal(drawn[7, 1], clips.rows([3], 7)[0]), "whoever else is in the batch"
    assert not np.array_equal(*clips.rows([3, 3], 7)), "a repeated tracklet shows other frames"
    with pytest.raises(ValueError, match="no tracklet"): Clips(samples[:0], root)
    for n_frames in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="n_frames must be a whole number"): Clips(samples, root, n_frames=n_frames)
    for tracklets in ([4], [0, -1]):
        with pytest.raises(ValueError, match=rf"no tracklet {tracklets[-1]}: .* 0 to 3"): clips.rows(tracklets)
    with pytest.raises(ValueError, match="tracklets must be .* whole numbers.*float64"): clips.rows([1.5])
    assert clips.load([]) == []


def test_an_image_that_a_tracklet_has_twice_is_told(crops):
    root, samples = crops
    doubled = samples.loc[samples.index.repeat(1 + samples.path.isin(["1_00.png", "3_04.png"]))]
    said = warned(Clips, doubled, root, n_frames=2)[1]
    assert len(said) == 1 and "2 rows repeat an image of the same tracklet" in said[0]
    assert "tracklet 10, 1_00.png" in said[0] and "drop_duplicates" in said[0]
    assert not warned(Clips, doubled.drop_duplicates(["tracklet", "path"]), root, n_frames=2)[1]


def test_unreadable_frames_of_a_clip(crops, tmp_path):
    root, samples = crops
    for path in samples.path: (tmp_path / path).write_bytes((root / path).read_bytes())
    for path in ("0_00.png", "2_00.png", "2_08.png"): (tmp_path / path).write_bytes(b"")
    clips, said = warned(Clips, samples, tmp_path, n_frames=3)
    assert len([s for s in said if "replaced by another image of tracklet" in s]) == 3
    assert clips.images.unreadable.path.tolist() == ["0_00.png", "2_00.png", "2_08.png"]
    assert clips.readable.tolist() == [False, True, True, True]
    first = clips.load([2])[0][0]
    assert torch.equal(first, clips.images[5]), "the next of the tracklet"
    assert torch.equal(clips.images[12], clips.images[5]), "in cyclic order, never another tracklet of this person"
    with pytest.raises(ValueError, match="tracklet 0 has no readable image"): clips.load([0])


# ── transforms ──
def test_draws_of_frames_and_of_flips_are_apart(crops):
    root, samples = crops
    clips, transform = Clips(samples, root, n_frames=2, seed=3), ClipTransform((8, 4), erase=0., seed=3)
    last, mirrored = [], []
    plain = ClipTransform((8, 4), erase=0., chance=0.)
    for epoch in range(200):
        clip, row = clips.load([3], epoch), clips.rows([3], epoch)[0]
        last.append(row[0] - clips.rows([3])[0, 0])
        mirrored.append(not torch.equal(transform(clip, [3], epoch)[0][0, 0], plain(clip, [3], epoch)[0][0, 0]))
    assert abs(np.corrcoef(last, mirrored)[0, 1]) < .2 and .4 < np.mean(mirrored) < .6


@pytest.mark.parametrize("flip", ["frame", "sequence"])
@pytest.mark.parametrize("rule", ["timm", "zhong"])
def test_transform_is_the_plain_loop(flip, rule):
    size, T, index = (16, 8), 5, np.array([4, 9, 4])
    clips = [[picture(20 + n + t, 11, 10 * n + t) for t in range(T)] for n in range(3)]
    x, boxes, seeds = ClipTransform(size, flip, erase=.7, seed=2, rule=rule)(clips, index, epoch=6)
    u = sample_draws(2, 6, index, 23 + (T if flip == "frame" else 1))
    for n, clip in enumerate(clips):
        for t, image in enumerate(clip):
            want = resize(image, size, "bicubic")[0]
            if u[n, 23 + (t if flip == "frame" else 0)] < .5: want = want.flip(-1)
            assert torch.equal(x[n, t], want)
    assert np.array_equal(boxes.numpy(), erase_boxes(u[:, 1:23], u[:, 0] < .7, size, rule))
    alone = ClipTransform(size, flip, erase=.7, seed=2, rule=rule)(clips[1:2], index[1:2], epoch=6)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, (x, boxes, seeds))), "no matter with whom"
    assert not np.array_equal(u[0], u[2]), "a tracklet that stands twice in a batch is augmented twice"


@pytest.mark.parametrize("fill", ["pixel", "const", "black"])
def test_the_erased_region_is_one_and_flips_differ(fill):
    spec = InputSpec(16, 8, mean=(.4, .5, .6))
    clips = torch.full((20, 6, 3, 16, 8), 200, dtype=torch.uint8)
    clips[..., :4] = 90                                       # left and right differ
    before = clips.clone()
    x, boxes, noise = ClipTransform((16, 8), erase=1., seed=0)(clips, np.arange(20))
    assert torch.equal(clips, before)
    kept = x.clone()
    out = clip_input(x, boxes, noise, spec, fill)
    assert torch.equal(x, kept) and out.shape == (20, 6, 3, 16, 8)
    mask = (out != normalise(x.flatten(0, 1), spec).unflatten(0, (20, 6))).any(2)
    for clip, (top, left, h, w) in zip(mask, boxes.tolist()):
        inside = torch.zeros(16, 8, dtype=torch.bool)
        inside[top:top + h, left:left + w] = True
        assert h and all(torch.equal(frame, inside) for frame in clip)
    assert len({tuple(box) for box in boxes.tolist()}) > 10, "every clip its own"
    left = x[:, :, 0, 0, 0] == 90
    assert ((left.sum(1) > 0) & (left.sum(1) < 6)).sum() > 12, "frames flip one by one"
    whole = ClipTransform((16, 8), "sequence")(clips, np.arange(20))[0][:, :, 0, 0, 0] == 90
    assert (whole == whole[:, :1]).all() and 3 < whole[:, 0].sum() < 17


@pytest.mark.parametrize("change, says", [
    (dict(flip="clip"), "frame, sequence"), (dict(erase=1.5), "chances"), (dict(chance=-1), "chances"),
    (dict(rule="mine"), "zhong, timm"), (dict(interpolation="nearest"), "interpolation='nearest': use .*bicubic"),
    (dict(size=64), r"size=64: two numbers are needed, .height, width."), (dict(size=(8, 4, 3)), "two numbers"),
    (dict(size=(0, 1)), "size: height must be .* of pixels.* got 0"), (dict(size=(8, 4.)), "width must be .*4.0")])
def test_bad_transforms(change, says):
    with pytest.raises(ValueError, match=says): ClipTransform(**change)


def test_bad_batches():
    image = picture(20, 10, 0)
    with pytest.raises(ValueError, match="different numbers of frames"): ClipTransform()([[image], [image] * 2], [0, 1])
    with pytest.raises(ValueError, match="1 clips but 2 tracklet numbers"): ClipTransform()([[image]], [0, 1])
    for images in ([image, image], torch.stack([image, image])):
        with pytest.raises(ValueError, match="images are given, and clips are needed"): ClipTransform()(images, [0, 1])
    with pytest.raises(ValueError, match="a batch without clips"): ClipTransform()([], [])
    with pytest.raises(ValueError, match="a clip without frames"): ClipTransform()([[]], [0])
    with pytest.raises(ValueError, match="float32"): ClipTransform()([[image.float()]], [0])
    x, boxes, noise = ClipTransform((8, 4))([[image]], [0])
    with pytest.raises(ValueError, match="fill='white'"): clip_input(x, boxes, noise, InputSpec(8, 4), "white")
    for pixels, found in ((x[0], r"uint8 of shape \(1, 3, 8, 4\)"), (x.float(), "float32")):
        with pytest.raises(ValueError, match=f"{found}.*ClipTransform gives"):
            clip_input(pixels, boxes, noise, InputSpec(8, 4))


class Loads:
    "As much of a task as a loader asks for."
    def __init__(self, clips): self.clips, self.images, self.transform = clips, clips.images, ClipTransform((16, 8))
    def load(self, rows, seen): return self.transform(self.clips.load(rows, seen), rows, seen)


@pytest.mark.slow("starts processes")
def test_workers_change_nothing(crops):
    task = Loads(Clips(crops[1], crops[0], n_frames=3))
    positions = [(Position(seen), np.array(rows)) for seen, rows in ((2, [3, 1]), (4, [2, 2]), (6, [0, 3]))]
    alone, forked = ([loaded.batch for loaded in loader(task, iter(positions), workers)] for workers in (0, 2))
    assert all(torch.equal(a, b) for x, y in zip(alone, forked, strict=True) for a, b in zip(x, y, strict=True))


# ── batches ──
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=9), st.sampled_from([1, 2, 4]), st.integers(1, 2),
       st.integers(0, 9))
def test_ranks_share_the_batches(counts, k, world_size, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    tracklets = np.random.default_rng(seed).permutation(1000)[:len(labels)]
    person, size = dict(zip(tracklets.tolist(), labels.tolist())), 2 * k * world_size
    make = lambda **how: quiet(TrackletSampler, labels, tracklets, size, k, seed=seed, **how)
    plan = make().plan(3)
    shards = []
    for rank in range(world_size):
        sampler = make(rank=rank, world_size=world_size)
        sampler.set_epoch(3)
        shards.append(list(sampler))
        sampler.set_epoch(3, advance=1)
        assert all(np.array_equal(a, b) for a, b in zip(sampler, shards[-1][1:], strict=True)), "resumed in mid-pass"
    assert np.array_equal(np.concatenate(shards, 1), plan)
    groups = np.vectorize(person.get)(plan).reshape(-1, k)
    assert (groups == groups[:, :1]).all(), "a group is one person"
    rows = np.repeat(np.arange(len(labels)), 1 + np.arange(len(labels)) % 3)          # frames instead of tracklets
    by_row = quiet(TrackletSampler, labels[rows], tracklets[rows], size, k, seed=seed)
    assert np.array_equal(by_row.plan(3), plan)


def test_people_with_one_tracklet_repeat_it_and_are_told(crops):
    labels, tracklets = np.array([0, 0, 0, 0, 1]), np.arange(5)
    with pytest.warns(UserWarning, match="1 of 2 people have one tracklet, which stands 4 times in a batch.*: 1$"):
        sampler = TrackletSampler(labels, tracklets, batch_size=8, k=4)
    batch = sampler.plan(0)[0]
    assert sorted(batch) == [0, 1, 2, 3, 4, 4, 4, 4]
    clips = Clips(crops[1], crops[0], n_frames=3)
    assert len(np.unique(clips.rows([3] * 4, epoch=0), axis=0)) > 1, "its clips show other frames"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrackletSampler(labels, tracklets, batch_size=2, k=1)
    sits_out = TrackletSampler([0, 0, 1, 1, -1, 3], [0, 1, 2, 3, 4, -1], batch_size=4, k=2)
    assert sorted(sits_out.plan(0)[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("change, says", [
    (dict(tracklets=[3, 3]), "tracklet 3 has two labels"), (dict(tracklets=[3]), "one each"),
    (dict(), "8 tracklets needs 4 groups of 2, the labels give 2: use a smaller batch_size"),
    (dict(tracklets=["a", "b"]), "tracklets must be .* whole numbers.*factorize"),
    (dict(labels=["a", "b"]), "labels must be .*factorize"),
    (dict(tracklets=[0., 1.]), "tracklets must be .*float64"), (dict(camids=[1]), r"camids need one value .*\(1,\)"),
    (dict(k=0), "^k must be a whole number, 1 or more, got 0"), (dict(k=2.), "^k must be .*2.0"),
    (dict(batch_size=0), "^batch_size must be .*got 0"), (dict(batch_size="8"), "^batch_size must be .*'8'"),
    (dict(batch_size=7), "7 tracklets at a time, not a multiple of k=2; use a multiple of 2$")])
def test_bad_samplers(change, says):
    with pytest.raises(ValueError, match=says):
        TrackletSampler(**dict(labels=[0, 1], tracklets=[0, 1], batch_size=8, k=2) | change)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_pieces_of_time_partition_their_tracklets(parts):
    rng = np.random.default_rng(parts)
    lengths = rng.integers(1, 30, 12)
    tracklet = np.repeat(100 + 7 * np.arange(12), lengths)
    frame = np.concatenate([np.sort(rng.choice(99, n, replace=False)) for n in lengths])
    samples = make_samples([f"{i}.png" for i in range(len(frame))], pid=tracklet // 7, tracklet=tracklet, frame=frame)
    samples = samples.sample(frac=1, random_state=0).reset_index(drop=True)
    cut = cut_in_time(samples, parts)
    assert cut.path.tolist() == samples.path.tolist() and cut.pid.equals(samples.pid)
    for (_, rows), n in zip(cut.groupby(samples.tracklet), lengths):
        by_time = rows.sort_values("frame")
        assert by_time.tracklet.is_monotonic_increasing and np.array_equal(by_time.tracklet % parts, by_time.part)
        want = [(i + 1) * n // parts - i * n // parts for i in range(parts)]
        assert np.bincount(rows.part, minlength=parts).tolist() == want
    assert cut.groupby("tracklet").pid.nunique().eq(1).all()
    for bad in (0, 1.5):
        said = f"parts must be a whole number of pieces.*{bad}"
        with pytest.raises(ValueError, match=said): cut_in_time(samples, bad)


def test_a_half_belongs_to_whom_most_of_it_shows():
    "A tracker's switch in the middle of a track leaves two halves of one person each."
    samples = make_samples([f"{i}.png" for i in range(6)], pid=[1, 1, 1, 2, 2, 1], tracklet=4, frame=np.arange(6))
    assert tracklet_table(cut_in_time(samples), mixed="most").pid.tolist() == [1, 2]

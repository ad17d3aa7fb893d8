"""Room `tracking`: damaged and empty videos, kills, detectors end to end, scores against the reference implementation."""
import json, os, shutil, signal, subprocess, sys, time, urllib.error, warnings
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings as hsettings, strategies as st

cv2 = pytest.importorskip("cv2", reason="needs the extra [track]")
pytest.importorskip("trackers", reason="needs the extra [track]")
from cion_nb.data import tracking as T, tracking_scores as scores_room, videos
from cion_nb.data.detectors import MOT_COLUMNS, MotDetections, OnnxDetector, TorchvisionDetector, create_detector
from cion_nb.data.tracking_scores import box_iou, match_truth, read_mot, tracking_scores, tracklets_to_mot

from cion_nb.core.samples import as_samples, read_samples

COLOURS = [(40, 40, 220), (40, 200, 40), (220, 60, 30), (30, 200, 220)]   # BGR
N, W, H = 90, 320, 240
ROOT = Path(__file__).resolve().parents[1]


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
        self.calls += len(frames); time.sleep(self.pause * len(frames))
        return [self._one(f) for f in frames]
    def _one(self, frame):
        boxes = []
        for colour in COLOURS:
            near = (np.abs(frame.astype(int) - colour).max(-1) < 60).astype(np.uint8)
            x, y, w, h = cv2.boundingRect(near)
            if w > 8 and h > 20: boxes.append((x, y, x + w, y + h))
        return np.array(boxes, float).reshape(-1, 4), np.full(len(boxes), 0.9)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    path = tmp_path_factory.mktemp("street") / "street.avi"
    return path, write_street(path)


OPTIONS = dict(detector=ColourDetector(), min_height=20, tracker="bytetrack")


def content(out):
    "Everything that counts in a finished folder."
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted((out / "crops").rglob("*.jpg"))}


# ---------------------------------------------------------------- the chain

@pytest.mark.parametrize("tracker", list(T.TRACKERS))
def test_every_tracker_follows_the_rectangles(street, tmp_path, tracker):
    samples = T.track(street[0], tmp_path, ColourDetector(), tracker, min_height=20)
    scores = tracking_scores(samples, street[1])
    assert scores["IDF1"] > 0.9 and scores["MOTA"] > 0.85 and scores["people"] == 4
    person = match_truth(samples, street[1])
    assert (person > 0).mean() > 0.98
    assert pd.Series(person).groupby(samples["tracklet"].to_numpy()).nunique().max() <= 2


def test_table_is_valid_and_matches_its_crops(street, tmp_path):
    samples = T.track(street[0], tmp_path, camid=3, video_name="a b/c", first_tracklet=100, **OPTIONS)
    pd.testing.assert_frame_equal(samples, as_samples(samples))
    pd.testing.assert_frame_equal(samples, read_samples(tmp_path / "samples.parquet"))
    assert list(samples.columns[-5:]) == list(T.BOX_COLUMNS) and samples["pid"].eq(-1).all() and samples["camid"].eq(3).all() and samples["video"].eq("a b/c").all()
    ids = samples["tracklet"].unique()
    assert sorted(ids) == list(range(100, 100 + len(ids)))
    assert not samples.duplicated(["tracklet", "frame"]).any() and samples["path"].is_unique
    assert samples[["tracklet", "frame"]].apply(tuple, axis=1).is_monotonic_increasing
    for row in samples.iloc[::37].itertuples():
        assert T.open_image(tmp_path / row.path).size == (row.w, row.h)
    inside = (samples[["x", "y"]] >= 0).all(axis=None) and (samples["x"] + samples["w"] <= W).all() and (samples["y"] + samples["h"] <= H).all()
    assert inside and samples["h"].min() >= 20


def test_crops_show_what_the_box_says(street, tmp_path):
    samples = T.track(street[0], tmp_path, **OPTIONS)
    person = match_truth(samples, street[1])
    for p in range(1, 5):
        row = samples[person == p].iloc[len(samples[person == p]) // 2]
        middle = np.asarray(T.open_image(tmp_path / row["path"]))[10:-10, 6:-6].mean((0, 1))[::-1]
        assert np.abs(middle - COLOURS[p - 1]).max() < 25


@pytest.mark.parametrize("stride", [1, 2, 7])
def test_stride_keeps_the_file_s_frame_numbers(street, tmp_path, stride):
    samples = T.track(street[0], tmp_path, stride=stride, **OPTIONS)
    assert (samples["frame"] % stride == 0).all() and samples["frame"].max() > N - 3 * stride - 1
    scores = tracking_scores(samples, street[1], frames=range(0, N, stride))
    assert scores["IDF1"] > (0.9 if stride < 7 else 0.4) and scores["precision"] > 0.95
    report = json.loads((tmp_path / "tracking.json").read_text())
    assert report["counts"]["frames"] == -(-N // stride) and report["video"]["read"] == N


def test_bad_stride(street, tmp_path):
    with pytest.raises(ValueError, match="stride 0"): T.track(street[0], tmp_path, stride=0, **OPTIONS)


def test_size_and_score_limits(street, tmp_path):
    tall = T.track(street[0], tmp_path / "a", ColourDetector(), min_height=50)
    assert len(tall) and tall["h"].min() >= 50
    wide = T.track(street[0], tmp_path / "b", ColourDetector(), min_height=20, min_width=23)
    assert wide["w"].min() >= 23
    with pytest.raises(T.NothingLeft, match="all 3.. detections are below min_score=0.95 .the best has 0.9"): T.track(street[0], tmp_path / "c", ColourDetector(), min_score=0.95)
    with pytest.raises(T.NothingLeft, match="lower than min_height=500"): T.track(street[0], tmp_path / "c", ColourDetector(), min_height=500)
    assert not (tmp_path / "c/samples.parquet").exists()
    counts = json.loads((tmp_path / "a/tracking.json").read_text())["counts"]
    assert counts["crops"] == len(tall) and counts["tracked"] == len(tall) + counts["too_small"]


# ---------------------------------------------------------------- resuming

def test_a_finished_folder_is_read_not_made_again(street, tmp_path):
    first, detector = T.track(street[0], tmp_path, **OPTIONS), ColourDetector()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}
    again = T.track(street[0], tmp_path, **{**OPTIONS, "detector": detector})
    pd.testing.assert_frame_equal(first, again)
    assert detector.calls == 0 and before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}


def test_a_lost_crop_comes_back(street, tmp_path):
    first = T.track(street[0], tmp_path, **OPTIONS)
    wanted = content(tmp_path)
    for p in first["path"][5:9]: (tmp_path / p).unlink()
    pd.testing.assert_frame_equal(first, T.track(street[0], tmp_path, **OPTIONS))
    assert content(tmp_path) == wanted


def test_other_settings_replace_the_crops_and_reuse_the_detections(street, tmp_path):
    T.track(street[0], tmp_path, **OPTIONS)
    detector = ColourDetector()
    other = T.track(street[0], tmp_path, detector, "ocsort", min_height=50)
    assert detector.calls == 0 and set(content(tmp_path)) == set(other["path"])
    fresh = T.track(street[0], tmp_path, detector, "ocsort", min_height=50, resume=False)
    assert detector.calls == N
    pd.testing.assert_frame_equal(other, fresh)


def test_another_video_in_the_same_folder_is_refused(street, tmp_path):
    T.track(street[0], tmp_path / "out", **OPTIONS)
    write_street(tmp_path / "other.avi", n=20, seed=1)
    with pytest.raises(ValueError, match="another video"): T.track(tmp_path / "other.avi", tmp_path / "out", **OPTIONS)
    assert T.track(tmp_path / "other.avi", tmp_path / "out", resume=False, **OPTIONS)["video"].eq("other").all()


def test_a_foreign_crops_folder_is_not_touched(street, tmp_path):
    (tmp_path / "crops").mkdir(); (tmp_path / "crops/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not written by"): T.track(street[0], tmp_path, **OPTIONS)
    assert (tmp_path / "crops/mine.txt").read_text() == "mine"


def test_two_processes_do_not_share_a_folder(street, tmp_path):
    from filelock import FileLock
    with FileLock(tmp_path / ".lock"), pytest.raises(RuntimeError, match="another process"): T.track(street[0], tmp_path, **OPTIONS)


CHILD = """
import sys, time
sys.path.insert(0, {tests!r}); sys.path.insert(0, {root!r})
import test_tracking as t
from cion_nb.data import tracking as T
detect = t.ColourDetector(pause={detect_pause})
if {crop_pause}:
    write = T._write_crop
    T._write_crop = lambda *a: (time.sleep({crop_pause}), write(*a))
T.track({video!r}, {out!r}, detect, "bytetrack", min_height=20)
"""


def run_and_kill(video, out, when, detect_pause=0.0, crop_pause=0.0):
    "Track in a process of its own and SIGKILL it as soon as `when()` holds."
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(ROOT), video=str(video), out=str(out), detect_pause=detect_pause, crop_pause=crop_pause)
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | dict(CION_NB_PROGRESS="0", OMP_NUM_THREADS="1"))
    end = time.time() + 60
    while not when() and child.poll() is None and time.time() < end: time.sleep(0.005)
    assert child.poll() is None, "the child ended before it could be killed"
    child.send_signal(signal.SIGKILL); child.wait()


def test_survives_sigkill_while_detecting_and_while_cutting(tmp_path):
    video, out, whole = tmp_path / "long.avi", tmp_path / "out", tmp_path / "whole"
    write_street(video, n=150)
    wanted = T.track(video, whole, **OPTIONS)
    run_and_kill(video, out, lambda: len(list(out.rglob("0*.npz"))) >= 1, detect_pause=0.02)
    assert not (out / "samples.parquet").exists()
    assert 1 <= len(list(out.rglob("0*.npz"))) < 3
    run_and_kill(video, out, lambda: len(list(out.rglob("*.jpg"))) >= 30, crop_pause=0.01)
    n_crops = len(list(out.rglob("*.jpg")))
    assert 30 <= n_crops < len(wanted) and not (out / "samples.parquet").exists()
    detector = ColourDetector()
    got = T.track(video, out, **{**OPTIONS, "detector": detector})
    pd.testing.assert_frame_equal(got, wanted)
    assert content(out) == content(whole) and detector.calls == 0
    assert json.loads((out / "tracking.json").read_text())["counts"]["crops_written"] <= len(wanted) - n_crops + 1


def test_a_damaged_block_is_detected_again(street, tmp_path):
    first = T.track(street[0], tmp_path, **OPTIONS)
    block = sorted(tmp_path.rglob("000001.npz"))[0]
    block.write_bytes(block.read_bytes()[:100])
    (tmp_path / "samples.parquet").unlink()
    detector = ColourDetector()
    pd.testing.assert_frame_equal(first, T.track(street[0], tmp_path, **{**OPTIONS, "detector": detector}))
    assert detector.calls == N - 64


# ---------------------------------------------------------------- bad and empty videos

def test_nobody_gives_an_empty_valid_table(tmp_path):
    write_street(tmp_path / "empty.avi", n=12, people=0)
    for tracker in T.TRACKERS:
        samples = T.track(tmp_path / "empty.avi", tmp_path / tracker, ColourDetector(), tracker)
        assert len(samples) == 0 and list(samples.columns[-5:]) == list(T.BOX_COLUMNS)
        pd.testing.assert_frame_equal(samples, read_samples(tmp_path / tracker / "samples.parquet"))
        assert samples["tracklet"].dtype == "int64" and samples["score"].dtype == "float32"
    again = T.track(tmp_path / "empty.avi", tmp_path / "sort", ColourDetector(), "sort")
    assert len(again) == 0
    assert T.contact_sheet(samples, tmp_path).size[0] > 0 and len(match_truth(samples, write_street(tmp_path / "t.avi", n=3))) == 0
    with pytest.warns(UserWarning, match="result holds no box"): assert tracking_scores(samples, write_street(tmp_path / "t.avi", n=3))["recall"] == 0


@pytest.mark.parametrize("name,data,reason", [
    ("gone.mp4", None, "no such file"), ("empty.mp4", b"", "zero bytes"), ("text.avi", b"I am no video at all. " * 50, "no video format"),
    ("half.mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2mp41\0\0\0\x08free" + b"\0" * 4000, "moov"),
    ("half.mkv", b"\x1aE\xdf\xa3" + bytes(range(256)) * 8, "damaged|no video format")])
def test_what_is_no_video_says_why(tmp_path, name, data, reason):
    if data is not None: (tmp_path / name).write_bytes(data)
    with pytest.raises(T.UnreadableVideo, match=reason) as error: T.track(tmp_path / name, tmp_path / "out", **OPTIONS)
    assert name in str(error.value) and error.value.path.endswith(name) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- image sequences

@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    "A folder as MOT17 has them, its detections, and its frames as a lossless list."
    home = tmp_path_factory.mktemp("sequences") / "MOT17-77"
    (home / "img1").mkdir(parents=True)
    truth = write_street(home.parent / "s.avi", n=24)
    frames = [picture() for _, picture in T.Video(home.parent / "s.avi").frames()]
    for i, frame in enumerate(frames, 1): cv2.imwrite(str(home / f"img1/{i:06d}.png"), frame)
    (home / "seqinfo.ini").write_text("[Sequence]\nname=MOT17-77\nimDir=img1\nframeRate=15\nseqLength=24\n")
    return home, truth, frames


def some_frames(folder, names, shape=(48, 64, 3)):
    folder.mkdir(parents=True, exist_ok=True)
    for i, n in enumerate(names): cv2.imwrite(str(folder / n), np.full(shape, i, np.uint8))
    return folder


def test_a_sequence_is_read_as_its_video_is(sequence, tmp_path):
    home, truth, frames = sequence
    want = T.track(home.parent / "s.avi", tmp_path / "video", **OPTIONS)
    for path in (home / "img1", home / "img1/%06d.png", home / "img1/%d.png"):
        assert T.Video(path).content == T.Video(home).content and T.Video(path).name == "MOT17-77" and T.Video(path).notes == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = T.track(home, tmp_path / "images", **OPTIONS)
    assert got["video"].eq("MOT17-77").all() and len(got) == len(want)
    pd.testing.assert_frame_equal(got[["tracklet", "frame", *T.BOX_COLUMNS]], want[["tracklet", "frame", *T.BOX_COLUMNS]])
    video = T.Video(home)
    assert video.info.frames == 24 and video.info.fps == 15 and (video.info.width, video.info.height) == (W, H)
    for (number, picture), frame in zip(video.frames(), frames): assert (picture() == frame).all()
    assert number == 23 == video.read - 1


def test_a_sequence_s_state_covers_its_images(sequence, tmp_path):
    home, _, frames = sequence
    folder = Path(shutil.copytree(home / "img1", tmp_path / "seq"))
    first, detector = T.track(folder, tmp_path / "out", frame_rate=15, **OPTIONS), ColourDetector()
    again = T.track(folder, tmp_path / "out", frame_rate=15, **{**OPTIONS, "detector": detector})
    assert detector.calls == 0 and again.equals(first)
    T.track(folder, tmp_path / "out", frame_rate=5, **{**OPTIONS, "detector": detector})
    assert detector.calls == 0                                             # the tracker's memory changes, the boxes do not
    cv2.imwrite(str(folder / "000009.png"), frames[3])
    with pytest.raises(ValueError, match="another video"): T.track(folder, tmp_path / "out", frame_rate=15, **OPTIONS)


def test_numbers_in_names_are_the_frames(tmp_path):
    def numbers(names): return [n for n, _ in T.Video(some_frames(tmp_path / str(len(list(tmp_path.iterdir()))), names), frame_rate=5).frames()]
    assert numbers(["1.png", "2.png", "10.png"]) == [0, 1, 9]
    assert numbers(["000000.png", "000001.png"]) == [0, 1]
    assert numbers(["cam3_f0005.png", "cam3_f0006.png"]) == [4, 5]
    assert numbers(["f1_t1700001.png", "f2_t1700041.png"]) == [0, 1]
    gap = T.Video(some_frames(tmp_path / "gap", ["000001.png", "000002.png", "000007.png"]))
    assert "4 of the numbers 1 to 7 have no image, from 3 on" in " ".join(gap.notes) and "25 frames per second are assumed" in " ".join(gap.notes)
    (tmp_path / "gap/notes.txt").write_text("x"); cv2.imwrite(str(tmp_path / "gap/cover.png"), np.zeros((5, 5, 3), np.uint8))
    assert "2 files of the folder are no frames (.png: 1, .txt: 1)" in " ".join(T.Video(tmp_path / "gap").notes)


def test_gaps_and_blocks_go_together(tmp_path):
    folder = some_frames(tmp_path / "s", [f"{i}.png" for i in (1, 2, 3, 50, 51, 52, 90)])
    class Seen(ColourDetector):
        def _one(self, frame): return np.array([[1, 1, 20, 40]]), np.array([.9])
    with pytest.warns(UserWarning, match="have no image"): boxes, n = T.detect(folder, Seen(), tmp_path / "c", block=2)
    assert boxes["frame"].tolist() == [0, 1, 2, 49, 50, 51, 89] and n == 90
    for file in sorted(tmp_path.rglob("*.npz"))[2:]: file.unlink()
    again = Seen()
    with pytest.warns(UserWarning): pd.testing.assert_frame_equal(T.detect(folder, again, tmp_path / "c", block=2)[0], boxes)
    assert again.calls == 3


@pytest.mark.parametrize("names,path,says", [
    (["000001.jpg", "000002.jpg"], "000001.jpg", r"one image, not a video.*%06d.jpg"), ([], "", "a folder without images"), (["a.jpg"], "", "no number in the names"),
    (["1.jpg", "01.jpg"], "", "different in every|same number"), (["1.jpg", "1.png"], "", "several kinds"), (["a1.jpg", "b2.jpg"], "", "several kinds"), (["1.jpg"], "%06d.png", "no file fits"),
    (["x/1.jpg", "y/1.jpg"], "", "several folders"), (["1.jpg"], "none/%d.jpg", "no folder")])
def test_what_is_no_sequence_says_why(tmp_path, names, path, says):
    for n in names: some_frames((tmp_path / "s" / n).parent, [Path(n).name])
    (tmp_path / "s").mkdir(exist_ok=True)
    with pytest.raises(T.UnreadableVideo, match=says): T.track(tmp_path / "s" / path if path else tmp_path / "s", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_bad_images_and_seqinfo_are_named(tmp_path):
    folder = some_frames(tmp_path / "s", ["1.png", "2.png", "3.png"])
    cv2.imwrite(str(folder / "2.png"), np.zeros((48, 66, 3), np.uint8))
    with pytest.raises(T.UnreadableVideo, match="2.png: 66x48 pixels, but 1.png has 64x48"): T.Video(folder)
    (folder / "2.png").write_bytes(b"")
    with pytest.raises(T.UnreadableVideo, match="2.png: a frame that is empty"): T.Video(folder)
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:60])
    with pytest.raises(T.UnreadableVideo, match="2.png"): [picture() for _, picture in T.Video(folder).frames()]
    some_frames(folder, ["1.png", "2.png", "3.png"])
    (folder / "seqinfo.ini").write_text("[Sequence]\nframeRate=12\nseqLength=9\n")
    assert T.Video(folder).info.fps == 12 and "announces 9 frames, there are 3" in T.Video(folder).notes[0]
    assert T.Video(folder, frame_rate=3).info.fps == 3
    (folder / "seqinfo.ini").write_text("[Sequence]\nframeRate=fast\n")
    with pytest.raises(ValueError, match="seqinfo.ini.*no numbers"): T.Video(folder)
    with pytest.raises(ValueError, match="frame_rate 0"): T.Video(folder, frame_rate=0)


def phone_video(path, turned=False, uneven=False):
    "An MP4 with a turned picture, or with a second half four times as slow."
    import struct
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (64, 48))
    for i in range(20): video.write(np.full((48, 64, 3), 5 * i, np.uint8))
    video.release()
    data = bytearray(path.read_bytes())
    if turned:
        at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
        data[at:at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    if uneven:
        at = data.index(b"stts")
        n, step = struct.unpack(">II", data[at + 12:at + 20])
        data[at + 8:at + 20] = struct.pack(">5I", 2, n // 2, step, n - n // 2, 4 * step)
        for box in (b"stts", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
            at = data.index(box) - 4
            data[at:at + 4] = struct.pack(">I", struct.unpack(">I", data[at:at + 4])[0] + 8)
    path.write_bytes(data)
    return path


def test_turned_and_uneven_videos_are_said(tmp_path):
    turned = T.Video(phone_video(tmp_path / "t.mp4", turned=True))
    assert "turned by 90 degrees" in turned.notes[0] and (turned.info.width, turned.info.height) == (48, 64)
    walk = turned.frames()
    assert next(walk)[1]().shape == (64, 48, 3)
    with pytest.warns(UserWarning, match="variable frame rate .40 to 160 ms"): T.track(phone_video(tmp_path / "u.mp4", uneven=True), tmp_path / "out", ColourDetector())
    with pytest.warns(UserWarning, match="variable frame rate"): T.track(tmp_path / "u.mp4", tmp_path / "out", ColourDetector())     # when read back too
    even = T.Video(phone_video(tmp_path / "e.mp4"))
    assert len(list(even.frames())) == 20 and even.notes == even.uneven == []


# ---------------------------------------------------------------- detections and their video

def det_file(path, truth, **values):
    return written(path, truth.assign(**({"id": -1, "score": .9} | values)))


@pytest.mark.parametrize("change,says", [
    (lambda t: t.assign(w=t["x"] + t["w"], h=t["y"] + t["h"]), "left, top, right, bottom"), (lambda t: t.assign(x=t["x"] + 1000), "outside of the picture"),
    (lambda t: t.assign(x=t["x"] / W, y=t["y"] / H, w=t["w"] / W, h=t["h"] / H), "fractions"), (lambda t: t.assign(frame=t["frame"] + 500), "another video"),
    (lambda t: t.assign(score=.01), "below min_score")])
def test_detections_of_another_kind_are_refused(street, tmp_path, change, says):
    file = written(tmp_path / "det.txt", change(street[1].assign(id=-1, score=.9)))
    with pytest.raises(T.NothingLeft, match=says): T.track(street[0], tmp_path / "out", str(file), min_height=20)
    assert not (tmp_path / "out/samples.parquet").exists() and not (tmp_path / "out/crops").exists()


def test_what_is_left_out_is_counted(street, tmp_path):
    truth = street[1]
    late = truth[truth["frame"] >= 80].assign(frame=lambda t: t["frame"] + 20)
    weak = truth[truth["frame"] % 10 == 0].assign(score=.02, id=9)
    file = written(tmp_path / "det.txt", pd.concat([truth.assign(score=.9), late.assign(score=.9), weak, truth[:5].assign(score=.9)]).assign(id=-1))
    with pytest.warns(UserWarning) as caught: samples = T.track(street[0], tmp_path / "out", str(file), min_height=20)
    said, counts = " ".join(str(w.message) for w in caught), samples.attrs["counts"]
    assert f"{len(late)} detections lie in frames that the video lacks" in said and "5 same box twice" in said
    assert counts["in_missing_frames"] == len(late) and counts["below_score"] == len(weak) and counts["file_same_box_twice"] == 5
    assert counts["detections"] == counts["tracked"] + counts["untracked"] and counts["tracked"] == counts["crops"] + counts["too_small"] + counts["outside"]
    assert counts["file_in_file"] == counts["detections"] + counts["below_score"] + len(late) + 5
    early = det_file(tmp_path / "early.txt", truth[truth["frame"] < 30])
    with pytest.warns(UserWarning, match="end in frame 30 of 90"): T.track(street[0], tmp_path / "e", str(early), min_height=20)


def test_classes_of_a_detections_file_are_asked_for(tmp_path):
    file = det_file(tmp_path / "det.txt", three_people(lambda i: i))
    with pytest.raises(ValueError, match=r"classes 1 .30 boxes.*MotDetections"): create_detector(str(file))
    detector = MotDetections(file, classes=1)
    assert detector.counts["other_classes"] == 60 and len(detector.detect([0])[0][0]) == 1
    with pytest.raises(ValueError, match="no box is of classes 8"): MotDetections(file, classes=8)
    assert MotDetections(written(tmp_path / "zero.txt", three_people(), first=0), first_frame=0).detect([29])[0][0].shape == (3, 4)
    (tmp_path / "empty.txt").write_text("")
    with pytest.warns(UserWarning, match="holds no box"): MotDetections(tmp_path / "empty.txt")


def test_a_missing_codec_says_so(street, tmp_path):
    odd = tmp_path / "odd.avi"
    odd.write_bytes(street[0].read_bytes().replace(b"MJPG", b"ZZZ9"))
    with pytest.raises(T.UnreadableVideo, match="codec"): T.track(odd, tmp_path / "out", **OPTIONS)


def test_a_container_without_frames(tmp_path):
    video = cv2.VideoWriter(str(tmp_path / "none.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 15, (W, H))
    video.release()
    with pytest.raises(T.UnreadableVideo): T.track(tmp_path / "none.avi", tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("stride", [1, 4])
def test_a_truncated_file_gives_what_was_there_and_a_warning(street, tmp_path, stride):
    data = street[0].read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[:len(data) // 2])
    with pytest.warns(UserWarning, match=rf"cut.avi: (\d+) of the {N} announced frames") as caught:
        samples = T.track(tmp_path / "cut.avi", tmp_path / "out", stride=stride, **OPTIONS)
    n = json.loads((tmp_path / "out/tracking.json").read_text())["video"]["read"]
    assert f" {n} of the {N}" in str(caught[0].message) and N // 3 < n < 2 * N // 3
    assert len(samples) and n - 2 * stride <= samples["frame"].max() < n
    with pytest.warns(UserWarning, match="announced"): T.track(tmp_path / "cut.avi", tmp_path / "out", stride=stride, **OPTIONS)   # also when it is read back


def test_one_frame(tmp_path):
    write_street(tmp_path / "one.avi", n=1)
    samples = T.track(tmp_path / "one.avi", tmp_path / "out", ColourDetector(), "bytetrack", min_height=20, tracker_settings=dict(minimum_consecutive_frames=1))
    assert len(samples) <= 4


# ---------------------------------------------------------------- many videos

def test_many_videos_share_no_tracklet(street, tmp_path):
    write_street(tmp_path / "second.avi", n=40, seed=2); write_street(tmp_path / "empty.avi", n=5, people=0)
    (tmp_path / "bad.avi").write_bytes(b"no")
    videos = [street[0], tmp_path / "second.avi", tmp_path / "empty.avi", tmp_path / "bad.avi"]
    with pytest.raises(T.UnreadableVideo): T.track_videos(videos, tmp_path / "out", **OPTIONS)
    with pytest.warns(UserWarning, match="skipped"): samples = T.track_videos(videos, tmp_path / "out", camids=[4, 5, 6, 7], on_unreadable="skip", **OPTIONS)
    assert set(samples["video"]) == {"street", "second"} and samples.groupby("tracklet")["video"].nunique().max() == 1
    assert samples.groupby("video")["camid"].first().to_dict() == dict(street=4, second=5)
    assert all((tmp_path / "out" / p).exists() for p in samples["path"])
    pd.testing.assert_frame_equal(samples, read_samples(tmp_path / "out/samples.parquet"))
    with pytest.raises(ValueError, match="3 camids for 4 videos"): T.track_videos(videos, tmp_path / "out", camids=[1, 2, 3], **OPTIONS)
    with pytest.raises(ValueError, match="pass a list"): T.track_videos(str(street[0]), tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match="dict name"): T.track_videos([street[0], street[0]], tmp_path / "o", **OPTIONS)
    assert len(T.track_videos([], tmp_path / "none", **OPTIONS)) == 0


# ---------------------------------------------------------------- detectors

def yolox_file(path, batch, size=64, hit=None):
    "An ONNX file whose output is the same for any picture: one person of log size 1 in cell `hit` of the stride-8 grid."
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto as P, helper as h, numpy_helper
    cells = (size // 8) ** 2 + (size // 16) ** 2 + (size // 32) ** 2
    raw = np.zeros((1, cells, 7), np.float32)
    if hit is not None:
        raw[0, hit] = [0.5, 0.25, 1, 2, 0.9, 0.1, 0.8]
        raw[0, hit + 1] = [-0.5, 0.25, 1, 2, 0.8, 0.1, 0.8]     # nearly the same box from the next cell: suppressed
    nodes = [h.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0), h.make_node("Mul", ["m", "zero"], ["z"]),
             h.make_node("Reshape", ["z", "shape"], ["r"]), h.make_node("Add", ["raw", "r"], ["y"])]
    init = [numpy_helper.from_array(a, n) for a, n in ((np.array([1, 2, 3]), "axes"), (np.zeros(1, np.float32), "zero"), (np.array([-1, 1, 1]), "shape"), (raw, "raw"))]
    graph = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", P.FLOAT, [batch, 3, size, size])], [h.make_tensor_value_info("y", P.FLOAT, [batch, cells, 7])], init)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)]); model.ir_version = 9
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("batch", [1, 4, "n"])
def test_onnx_detector_decodes_and_suppresses(tmp_path, batch):
    detector = create_detector(str(yolox_file(tmp_path / "y.onnx", batch, hit=8 * 2 + 3)))
    detector.person = 1
    out = detector.detect([np.zeros((128, 64, 3), np.uint8)] * 5)            # scale 1/2
    centre, size = np.array([3.5, 2.25]) * 8 * 2, np.exp([1, 2]) * 8 * 2
    for boxes, scores in out:
        assert len(boxes) == 1 and np.isclose(scores[0], 0.72)
        np.testing.assert_allclose(boxes[0], [*(centre - size / 2), *(centre + size / 2)], rtol=1e-5)


def test_onnx_detector_refuses_other_files(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto as P, helper as h
    with pytest.raises(FileNotFoundError, match="no such detector"): create_detector(str(tmp_path / "none.onnx"))
    graph = h.make_graph([h.make_node("Relu", ["x"], ["y"])], "g", [h.make_tensor_value_info("x", P.FLOAT, [1, 256, 128, 3])], [h.make_tensor_value_info("y", P.FLOAT, [1, 256, 128, 3])])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)]); model.ir_version = 9
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match="YOLOX-style"): OnnxDetector(tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="not YOLOX"): OnnxDetector(yolox_file(tmp_path / "y.onnx", 1), person=7).detect([np.zeros((64, 64, 3), np.uint8)])


def test_torchvision_detector(tmp_path, monkeypatch):
    import torch, torchvision
    torch.manual_seed(0)
    detector = TorchvisionDetector(weights=None, min_score=0.0)
    torch.save(detector._model.state_dict(), tmp_path / "w.pth")
    frames = [np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)] * 2
    loaded = TorchvisionDetector(weights=tmp_path / "w.pth", min_score=0.0)
    for (b, s), (b2, s2) in zip(detector.detect(frames), loaded.detect(frames)):
        assert b.shape == (len(s), 4)
        np.testing.assert_allclose(b, b2)
    assert detector.settings != loaded.settings
    def offline(*args, **kw): raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(RuntimeError, match="could not be fetched.*weights=PATH"): create_detector("torchvision")


def test_hog_runs_on_any_size(tmp_path):
    hog = create_detector("hog")
    for shape in ((240, 320, 3), (60, 40, 3)):
        (boxes, scores), = hog.detect([np.full(shape, 128, np.uint8)])
        assert boxes.shape == (len(scores), 4)


def test_mot_detections(street, tmp_path):
    truth, file = street[1], tmp_path / "det.txt"
    truth.assign(frame=truth["frame"] + 1, id=-1, score=0.9).to_csv(file, header=False, index=False)
    samples = T.track(street[0], tmp_path / "out", str(file), min_height=20)
    assert tracking_scores(samples, truth)["IDF1"] > 0.9
    assert MotDetections(file).detect([10 ** 6])[0][0].shape == (0, 4)
    truth.assign(frame=truth["frame"] + 1, score=np.linspace(-2, 60, len(truth))).to_csv(file, header=False, index=False)
    with pytest.warns(UserWarning, match="stretched"): detector = MotDetections(file)
    assert 0 <= min(s.min() for _, s in detector._of.values()) and max(s.max() for _, s in detector._of.values()) <= 1
    truth.assign(frame=truth["frame"] + 1, score=-1).to_csv(file, header=False, index=False)
    assert all((s == 1).all() for _, s in MotDetections(file)._of.values())
    with pytest.raises(FileNotFoundError): MotDetections(tmp_path / "none.txt")


def test_read_mot_names_the_bad_line(tmp_path):
    (tmp_path / "a.txt").write_text("1,1,0,0,5,5,1\n\n1,2,zero,0,5,5,1\n")
    with pytest.raises(ValueError, match="line 3"): read_mot(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("0,1,0,0,5,5,1\n")
    with pytest.raises(ValueError, match="line 1.*frames from 1"): read_mot(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("")
    assert len(read_mot(tmp_path / "a.txt")) == 0
    (tmp_path / "a.txt").write_text("3 7 1 2 5 6\r\n")
    row = read_mot(tmp_path / "a.txt").iloc[0]
    assert (row["frame"], row["id"], row["score"], row["class"]) == (2, 7, 1, -1)


def test_a_detector_that_answers_nonsense_is_named(street, tmp_path):
    class Short:
        def detect(self, frames): return [(np.zeros((1, 4)), np.ones(1))] * (len(frames) - 1)
    with pytest.raises(ValueError, match="Short.detect returned"): T.track(street[0], tmp_path, Short())
    class Nan:
        def detect(self, frames): return [(np.array([[np.nan] * 4, [5, 5, 40, 80]]), np.array([.9, .9])) for _ in frames]
    assert T.track(street[0], tmp_path / "nan", Nan(), "bytetrack")["x"].eq(5).all()
    with pytest.raises(ValueError, match="not known"): T.track(street[0], tmp_path / "no", "yolo")
    with pytest.raises(ValueError, match="known: bytetrack"): T.track(street[0], tmp_path / "no", ColourDetector(), "deepsort")
    with pytest.raises(ValueError, match="its settings are"): T.track(street[0], tmp_path / "no", ColourDetector(), "sort", tracker_settings=dict(buffer=3))


# ---------------------------------------------------------------- optional parts

def test_missing_parts_say_what_to_install(monkeypatch):
    def missing(name): raise ModuleNotFoundError(f"No module named {name!r}")
    monkeypatch.setattr(videos.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"cion_nb\[track\]"): T.Video(__file__)
    def no_gl(name): raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")
    monkeypatch.setattr(videos.importlib, "import_module", no_gl)
    with pytest.raises(ImportError, match="apt-get install -y libgl1"): T.Video(__file__)


def test_import_is_light():
    code = "import sys, cion_nb.data.tracking; print([m for m in ('cv2', 'trackers', 'supervision', 'trackeval', 'onnxruntime', 'torchvision', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


# ---------------------------------------------------------------- boxes and scores

boxes_ = st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 20)] * 2), max_size=6)


@given(boxes_, boxes_)
@hsettings(deadline=None, max_examples=60)
def test_iou_counts_pixels(a, b):
    def mask(box): m = np.zeros((60, 60), bool); x, y, w, h = box; m[y:y + h, x:x + w] = True; return m
    def ltrb(boxes): return np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], float).reshape(-1, 4)
    want = np.array([[(mask(p) & mask(q)).sum() / (mask(p) | mask(q)).sum() for q in b] for p in a]).reshape(len(a), len(b))
    np.testing.assert_allclose(box_iou(ltrb(a), ltrb(b)), want)


def random_mot(seed, classes):
    "Truth with flags and classes, and a noisy answer to it with wrong ids, misses and false boxes."
    rng, gt, mine = np.random.default_rng(seed), [], []
    for person in range(1, 9):
        kind = int(rng.choice([1, 1, 1, 7, 8, 12, 3])) if classes else -1
        x, y = rng.uniform(0, 400, 2)
        for f in range(rng.integers(0, 10), 30):
            x, y = x + rng.normal(3, 1), y + rng.normal(0, 1)
            gt.append((f, person, x, y, 40, 100, int(kind in (1, -1) and rng.random() > 0.1), kind, 1.0))
            if rng.random() < 0.85:
                mine.append((f, person + (100 if f > 15 and person % 3 == 0 else 0), x + rng.normal(0, 6), y + rng.normal(0, 6), 40, 100, 0.9))
            if rng.random() < 0.1: mine.append((f, 1000 + person, *rng.uniform(0, 400, 2), 40, 100, 0.5))
    mine = pd.DataFrame(mine, columns=["frame", "tracklet", "x", "y", "w", "h", "score"]).drop_duplicates(["frame", "tracklet"])
    return pd.DataFrame(gt, columns=list(MOT_COLUMNS)).round(2), mine.round(2).assign(video="v").sort_values(["tracklet", "frame"], ignore_index=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("benchmark", ["MOT15", "MOT17"])
def test_scores_equal_the_reference_run_from_files(tmp_path, seed, benchmark):
    import trackeval
    gt, mine = random_mot(seed, benchmark == "MOT17")
    folder = tmp_path / "gt" / "SEQ"
    (folder / "gt").mkdir(parents=True); (tmp_path / "res/ours/data").mkdir(parents=True)
    gt.assign(frame=gt["frame"] + 1).to_csv(folder / "gt/gt.txt", header=False, index=False)
    tracklets_to_mot(mine, tmp_path / "res/ours/data/SEQ.txt")
    (folder / "seqinfo.ini").write_text(f"[Sequence]\nname=SEQ\nseqLength=30\n")
    quiet = dict(PRINT_CONFIG=False)
    data = trackeval.datasets.MotChallenge2DBox(dict(GT_FOLDER=str(tmp_path / "gt"), TRACKERS_FOLDER=str(tmp_path / "res"), BENCHMARK=benchmark, SEQ_INFO={"SEQ": None}, SKIP_SPLIT_FOL=True, **quiet))
    evaluator = trackeval.Evaluator(dict(PRINT_RESULTS=False, OUTPUT_SUMMARY=False, OUTPUT_DETAILED=False, PLOT_CURVES=False, TIME_PROGRESS=False, LOG_ON_ERROR=None, BREAK_ON_ERROR=True, **quiet))
    result, _ = evaluator.evaluate([data], [trackeval.metrics.CLEAR(quiet), trackeval.metrics.Identity(quiet), trackeval.metrics.HOTA()])
    want = result["MotChallenge2DBox"]["ours"]["SEQ"]["pedestrian"]
    got = tracking_scores(mine, folder / "gt/gt.txt", frames=range(30), benchmark=benchmark)
    assert got["MOTA"] == pytest.approx(want["CLEAR"]["MOTA"], abs=1e-9) and got["switches"] == want["CLEAR"]["IDSW"]
    assert got["IDF1"] == pytest.approx(want["Identity"]["IDF1"], abs=1e-9) and got["HOTA"] == pytest.approx(np.mean(want["HOTA"]["HOTA"]), abs=1e-6)


def test_perfect_and_empty_scores():
    gt, _ = random_mot(0, False)
    gt = gt.assign(score=1.0)
    perfect = gt.rename(columns=dict(id="tracklet")).assign(video="v")
    scores = tracking_scores(perfect, gt)
    assert scores["MOTA"] == scores["IDF1"] == 1 and scores["HOTA"] == pytest.approx(1)
    assert (match_truth(perfect, gt) == gt["id"]).all()
    with pytest.warns(UserWarning, match="truth holds no box"): nobody = tracking_scores(perfect, gt[:0])
    assert nobody["recall"] == 0 and nobody["truth_boxes"] == 0
    two = pd.concat([perfect, perfect.assign(video="w")])
    for score in (tracking_scores, match_truth):
        with pytest.raises(ValueError, match="one video"): score(two, gt)


# ---------------------------------------------------------------- files that people really have

def three_people(cls=lambda i: 1, flag=lambda i: 1, ids=lambda i: i, n=30, speed=1):
    "Three people who walk side by side, as rows of a truth file (frames from 0 here)."
    return pd.DataFrame([(f, ids(i), 100 * i + speed * f, 50, 40, 100, flag(i), cls(i), 1) for f in range(n) for i in (1, 2, 3)], columns=list(MOT_COLUMNS))


def written(path, table, first=1, sep=",", encoding="utf-8"):
    path.write_bytes(table.assign(frame=table["frame"] + first).to_csv(header=False, index=False, sep=sep).encode(encoding))
    return path


def as_result(table): return table.rename(columns=dict(id="tracklet")).drop(columns=["class", "visibility"]).assign(video="v")


def test_one_id_twice_in_a_frame_is_refused_on_every_path(tmp_path):
    good = three_people()
    shared, doubled = three_people(ids=lambda i: 1 if i == 3 else i), pd.concat([good, good])
    for bad in (shared, doubled):
        file = written(tmp_path / "bad.txt", bad)
        for gt in (bad, file, str(file), read_mot(file)):
            with pytest.raises(ValueError, match="truth: id 1 .* in frame 1"): tracking_scores(as_result(good), gt)
            with pytest.raises(ValueError, match="truth: id 1 .* in frame 1"): match_truth(as_result(good), gt)
        for result in (as_result(bad), bad, file, read_mot(file)):
            with pytest.raises(ValueError, match="result: id 1 .* in frame 1"): tracking_scores(result, good)
        with pytest.raises(ValueError, match="id 1 .* in frame 1"): tracklets_to_mot(as_result(bad), tmp_path / "r.txt")
    late = pd.concat([good, good[good["frame"] == 17].assign(x=500)])
    with pytest.raises(ValueError, match="id 1 .* in frame 18 .*; 17 from 0"): tracking_scores(as_result(late), good)
    with pytest.raises(ValueError, match="id -1 .* detections"): tracking_scores(good.assign(id=-1), good)
    with pytest.raises(ValueError, match="id -1 .* detections"): tracking_scores(good, written(tmp_path / "det.txt", good.assign(id=-1)))


def test_the_reference_s_own_guard_stands_behind_ours(monkeypatch):
    import trackeval
    monkeypatch.setattr(scores_room, "_check_ids", lambda *a: None)
    good = three_people()
    with pytest.raises(trackeval.utils.TrackEvalException, match="same ID more than once"): tracking_scores(pd.concat([good, good]), good)


@pytest.mark.parametrize("cls,classes,boxes", [
    (lambda i: 2, 2, 90), (lambda i: 4, (4,), 90), (lambda i: 0, [0], 90), (lambda i: 1 if i == 1 else 2, (1, 2), 90), (lambda i: 1 if i == 1 else 6, (6,), 60)])
def test_class_numbers_of_another_tool_are_refused_until_named(tmp_path, cls, classes, boxes):
    gt, result = written(tmp_path / "gt.txt", three_people(cls)), as_result(three_people())
    for score in (tracking_scores, match_truth):
        with pytest.raises(ValueError, match=r"gt.txt: truth: classes .*boxes.*benchmark=.*classes=") as e: score(result, gt)
    got = tracking_scores(result, gt, classes=classes)
    assert got["truth_boxes"] == boxes and got["truth_left_out"] == 90 - boxes == sum(got.left_out["truth_of_class"].values())
    assert got["recall"] == 1 and (match_truth(result, gt, classes=classes) > 0).sum() == boxes
    every = tracking_scores(result, gt, benchmark="MOT15")
    assert every["MOTA"] == 1 and every["truth_left_out"] == 0


def test_benchmarks_differ_as_the_reference_says(tmp_path):
    gt, result = three_people(lambda i: 1 if i == 1 else 6, flag=lambda i: int(i == 1)), as_result(three_people())
    with pytest.raises(ValueError, match="6 .60 boxes"): tracking_scores(result, gt)                 # MOT17 and MOT20 differ there
    assert tracking_scores(result, gt, benchmark="MOT17")["MOTA"] == -1
    twenty = tracking_scores(result, gt, benchmark="mot-20")
    assert twenty["MOTA"] == 1 and twenty["boxes_left_out"] == twenty.left_out["boxes_on_distractors"] == 60
    (tmp_path / "MOT20-01/gt").mkdir(parents=True)
    with pytest.warns(UserWarning, match="taken for MOT20"): named = tracking_scores(result, written(tmp_path / "MOT20-01/gt/gt.txt", gt))
    assert named.benchmark == "MOT20" and named["MOTA"] == 1
    with pytest.warns(UserWarning, match="taken for MOT17"): guessed = tracking_scores(result, gt.assign(**{"class": gt["class"].replace(6, 7)}))
    assert guessed.benchmark == "MOT17" and guessed["MOTA"] == 1 and "MOT17" in guessed.notes[0]
    with pytest.raises(ValueError, match="known: MOT15"): tracking_scores(result, gt, benchmark="MOT99")
    with pytest.raises(ValueError, match="classes 1 to 13"): tracking_scores(result, three_people(lambda i: i - 1), benchmark="MOT17")
    with pytest.raises(ValueError, match="classes 1 to 13"): tracking_scores(result, three_people(lambda i: -1), benchmark="MOT17")
    with pytest.raises(ValueError, match="not both"): tracking_scores(result, gt, benchmark="MOT17", classes=1)


def test_world_coordinates_are_no_classes(tmp_path):
    gt = three_people().astype({"class": float}).assign(**{"class": lambda t: t["x"] / 7 - 9.3})
    assert tracking_scores(as_result(three_people()), gt)["MOTA"] == 1 and tracking_scores(gt, gt).benchmark == "MOT15"
    ten = three_people(lambda i: 1 if i == 1 else 4, flag=lambda i: int(i == 1)).assign(occlusion=0)    # VisDrone's columns, or MOT15's
    with pytest.raises(ValueError, match="VisDrone"): tracking_scores(as_result(three_people()), written(tmp_path / "gt.txt", ten))


def test_nothing_left_to_score_is_an_error():
    result = as_result(three_people())
    with pytest.raises(ValueError, match="none of its 90 .*'truth_with_flag_0': 90"): tracking_scores(result, three_people(flag=lambda i: 0))
    assert (match_truth(result, three_people(flag=lambda i: 0)) > 0).all()                            # ignored rows name people
    with pytest.raises(ValueError, match="none of its 90"): tracking_scores(result, three_people(), classes=7)
    with pytest.raises(ValueError, match="no class numbers"): tracking_scores(result, three_people(lambda i: -1), classes=7)
    with pytest.raises(ValueError, match="no box lies in the frames"): tracking_scores(result, three_people(), frames=range(40, 50))
    with pytest.raises(ValueError, match="share no frame"): tracking_scores(result.assign(frame=result["frame"] + 100), three_people())
    with pytest.raises(ValueError, match="a flag"): tracking_scores(result, three_people(flag=lambda i: .9))
    with pytest.raises(ValueError, match="is no box"): tracking_scores(result.assign(w=-3), three_people())
    with pytest.raises(ValueError, match="no column x"): tracking_scores(result.drop(columns="x"), three_people())
    with pytest.raises(ValueError, match="classes 1 .30.*2 .30"): tracking_scores(three_people(lambda i: i), three_people())
    part = tracking_scores(three_people(lambda i: i), three_people(), classes=1)
    assert part.left_out["boxes_of_other_classes"] == part["boxes_left_out"] == 60 and part["recall"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("change,says", [
    (lambda r: r[:0], "result holds no box"), (lambda r: r[r["frame"] < 12], "covers frames 0 to 11"), (lambda r: r[r["frame"] % 3 == 0], r"every 3th frame.*range\(0, n, 3\)"),
    (lambda r: r.assign(frame=r["frame"] + 1), "moved by -1 frame.*counts? frames from 0"), (lambda r: r[r["frame"] > 0].assign(frame=lambda t: t["frame"] - 1), r"moved by \+1 frame"),
    (lambda r: r.assign(x=r["x"] * 7), "no box overlaps")])
def test_results_that_do_not_fit_their_truth_are_said(change, says):
    truth = three_people(speed=6)
    with pytest.warns(UserWarning, match=says) as caught: scores = tracking_scores(as_result(change(truth)), truth)
    assert len(caught) == len(scores.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tracking_scores(as_result(truth), truth).notes == []


def test_read_mot_takes_what_programs_write(tmp_path):
    want, file = three_people(n=4), tmp_path / "a.txt"
    for sep, encoding in ((",", "utf-8-sig"), (";", "utf-8"), ("\t", "utf-8"), (" ", "utf-8"), (", ", "utf-8")):
        text = want.assign(frame=want["frame"] + 1).astype(str).agg(sep.join, axis=1)
        file.write_bytes("\r\n".join([*text, ""]).encode(encoding))
        pd.testing.assert_frame_equal(read_mot(file), want.astype(read_mot(file).dtypes))
    file.write_text("1.000e+00,2e0,1.5E+02,5e1,4e1,1e2,9.9e-01,-1,-1,-1\n")
    assert read_mot(file)[["frame", "id", "x", "score"]].iloc[0].tolist() == [0, 2, 150, .99]
    assert read_mot(written(file, want, first=0), first_frame=0)["frame"].max() == 3
    for line, says in (("1;1;399,5;182,0;121;229;1", "decimal point"), ("1 1 399,5 182,0 121 229 1", "decimal point"), ("1,1,399,5,182,0,121,2,229,1,1,-1", "12 fields.*not commas"),
                       ("frame,id,x,y,w,h", "delete a header"), ("0 1 Pedestrian 0 0 -1.57 12 50 60 120 1.8 .6 .5 1 2 3 0", "KITTI"), ("1,1.5,0,0,5,5,1", "whole number"),
                       ("1,1,,0,5,5,1", "no row of numbers"), ("1,1,nan,0,5,5,1", "not finite"), ("0,1,0,0,5,5,1", "first_frame=0"), ("1,1,0,0,5,5,1\n2,1,0,0,5,5", "line 2.*6 fields, the first line 7")):
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=says) as e: read_mot(file)
        assert str(file) in str(e.value) and "line " in str(e.value)
    for encoding in ("utf-16", "gbk"):
        file.write_bytes("1,1,0,0,5,5,1 # 行人\n".encode(encoding))
        with pytest.raises(ValueError, match="a.txt.*UTF-8"): read_mot(file)


def test_matching_is_one_to_one():
    gt = pd.DataFrame([(0, 1, 0, 0, 10, 20, 1, -1, -1), (0, 2, 3, 0, 10, 20, 1, -1, -1)], columns=list(MOT_COLUMNS))
    mine = pd.DataFrame(dict(frame=[0, 0, 0], x=[1, 2, 100], y=0, w=10, h=20))
    assert match_truth(mine, gt).tolist() == [1, 2, -1]


def test_mot_round_trip(street, tmp_path):
    samples = T.track(street[0], tmp_path, **OPTIONS)
    back = read_mot(tracklets_to_mot(samples, tmp_path / "r.txt"))
    want = samples.sort_values(["frame", "tracklet"], ignore_index=True)
    assert (back["frame"] == want["frame"]).all() and (back["id"] == want["tracklet"]).all()
    np.testing.assert_allclose(back[list(T.BOX_COLUMNS)], want[list(T.BOX_COLUMNS)], atol=1e-4)


def test_crops_are_a_tracklet_folder(street, tmp_path):
    from cion_nb.core.samples import read_tracklets
    samples = T.track(street[0], tmp_path, **OPTIONS)
    again = read_tracklets(tmp_path / "crops")
    assert ("crops/" + again["path"]).tolist() == samples["path"].tolist()
    assert (again[["tracklet", "frame"]].to_numpy() == samples[["tracklet", "frame"]].to_numpy()).all() and (again["video"] == samples["video"]).all()

"""Videos and sequences of images: damaged, empty, cut, turned, uneven; what is no video says why."""
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from places import ROOT
from street import ColourDetector, H, N, OPTIONS, W, write_street

from cion_nb.core.samples import read_samples
from cion_nb.data import tracking as T, videos
from cion_nb.data.tracking_scores import match_truth, tracking_scores

pytest.importorskip("trackers", reason="needs the extra [track]")

cv2 = pytest.importorskip("cv2", reason="needs the extra [track]")


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
    assert T.contact_sheet(samples, tmp_path).size[0] > 0
    assert len(match_truth(samples, write_street(tmp_path / "t.avi", n=3))) == 0
    with pytest.warns(UserWarning, match="result holds no box"):
        assert tracking_scores(samples, write_street(tmp_path / "t.avi", n=3))["recall"] == 0


@pytest.mark.parametrize("name,data,reason", [
    ("gone.mp4", None, "no such file"), ("empty.mp4", b"", "zero bytes"),
    ("text.avi", b"I am no video at all. " * 50, "no video format"),
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
        assert T.Video(path).content == T.Video(home).content and T.Video(path).name == "MOT17-77"
        assert T.Video(path).notes == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = T.track(home, tmp_path / "images", **OPTIONS)
    assert got["video"].eq("MOT17-77").all() and len(got) == len(want)
    pd.testing.assert_frame_equal(got[["tracklet", "frame", *T.BOX_COLUMNS]],
                                  want[["tracklet", "frame", *T.BOX_COLUMNS]])
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
    # the tracker's memory changes, the boxes do not
    assert detector.calls == 0
    cv2.imwrite(str(folder / "000009.png"), frames[3])
    with pytest.raises(ValueError, match="another video"): T.track(folder, tmp_path / "out", frame_rate=15, **OPTIONS)


def test_numbers_in_names_are_the_frames(tmp_path):
    def numbers(names):
        return [n for n, _ in T.Video(some_frames(tmp_path / str(len(list(tmp_path.iterdir()))), names),
                                      frame_rate=5).frames()]
    assert numbers(["1.png", "2.png", "10.png"]) == [0, 1, 9]
    assert numbers(["000000.png", "000001.png"]) == [0, 1]
    assert numbers(["cam3_f0005.png", "cam3_f0006.png"]) == [4, 5]
    assert numbers(["f1_t1700001.png", "f2_t1700041.png"]) == [0, 1]
    gap = T.Video(some_frames(tmp_path / "gap", ["000001.png", "000002.png", "000007.png"]))
    assert "4 of the numbers 1 to 7 have no image, from 3 on" in " ".join(gap.notes)
    assert "25 frames per second are assumed" in " ".join(gap.notes)
    (tmp_path / "gap/notes.txt").write_text("x")
    cv2.imwrite(str(tmp_path / "gap/cover.png"), np.zeros((5, 5, 3), np.uint8))
    assert "2 files of the folder are no frames (.png: 1, .txt: 1)" in " ".join(T.Video(tmp_path / "gap").notes)


def test_gaps_and_blocks_go_together(tmp_path):
    folder = some_frames(tmp_path / "s", [f"{i}.png" for i in (1, 2, 3, 50, 51, 52, 90)])
    class Seen(ColourDetector):
        def _one(self, frame): return np.array([[1, 1, 20, 40]]), np.array([.9])
    with pytest.warns(UserWarning, match="have no image"): boxes, n = T.detect(folder, Seen(), tmp_path / "c", block=2)
    assert boxes["frame"].tolist() == [0, 1, 2, 49, 50, 51, 89] and n == 90
    for file in sorted(tmp_path.rglob("*.npz"))[2:]: file.unlink()
    again = Seen()
    with pytest.warns(UserWarning):
        pd.testing.assert_frame_equal(T.detect(folder, again, tmp_path / "c", block=2)[0], boxes)
    assert again.calls == 3


@pytest.mark.parametrize("names,path,says", [
    (["000001.jpg", "000002.jpg"], "000001.jpg", r"one image, not a video.*%06d.jpg"),
    ([], "", "a folder without images"), (["a.jpg"], "", "no number in the names"),
    (["1.jpg", "01.jpg"], "", "different in every|same number"), (["1.jpg", "1.png"], "", "several kinds"),
    (["a1.jpg", "b2.jpg"], "", "several kinds"), (["1.jpg"], "%06d.png", "no file fits"),
    (["x/1.jpg", "y/1.jpg"], "", "several folders"), (["1.jpg"], "none/%d.jpg", "no folder")])
def test_what_is_no_sequence_says_why(tmp_path, names, path, says):
    for n in names: some_frames((tmp_path / "s" / n).parent, [Path(n).name])
    (tmp_path / "s").mkdir(exist_ok=True)
    with pytest.raises(T.UnreadableVideo, match=says):
        T.track(tmp_path / "s" / path if path else tmp_path / "s", tmp_path / "out", **OPTIONS)
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
    with pytest.warns(UserWarning, match="variable frame rate .40 to 160 ms"):
        T.track(phone_video(tmp_path / "u.mp4", uneven=True), tmp_path / "out", ColourDetector())
    # when read back too
    with pytest.warns(UserWarning, match="variable frame rate"):
        T.track(tmp_path / "u.mp4", tmp_path / "out", ColourDetector())
    even = T.Video(phone_video(tmp_path / "e.mp4"))
    assert len(list(even.frames())) == 20 and even.notes == even.uneven == []


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
    # also when it is read back
    with pytest.warns(UserWarning, match="announced"):
        T.track(tmp_path / "cut.avi", tmp_path / "out", stride=stride, **OPTIONS)


def test_one_frame(tmp_path):
    write_street(tmp_path / "one.avi", n=1)
    samples = T.track(tmp_path / "one.avi", tmp_path / "out", ColourDetector(), "bytetrack", min_height=20,
                      tracker_settings=dict(minimum_consecutive_frames=1))
    assert len(samples) <= 4


# ---------------------------------------------------------------- optional parts

def test_missing_parts_say_what_to_install(monkeypatch):
    def missing(name): raise ModuleNotFoundError(f"No module named {name!r}")
    monkeypatch.setattr(videos.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"cion_nb\[track\]"): T.Video(__file__)
    def no_gl(name): raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")
    monkeypatch.setattr(videos.importlib, "import_module", no_gl)
    with pytest.raises(ImportError, match="apt-get install -y libgl1"): T.Video(__file__)


@pytest.mark.slow("starts processes")
def test_import_is_light():
    code = ("import sys, cion_nb.data.tracking; print([m for m in ('cv2', 'trackers', 'supervision', 'trackeval', "
            "'onnxruntime', 'torchvision', 'torch') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


# ---------------------------------------------------------------- folders of videos

def test_a_collection_is_its_files_by_their_paths(tmp_path):
    "In folders, behind a link, in capitals; neither hidden ones nor other files."
    for name in ("b.mp4", "a/c.MKV", "a/b/d.webm", "._b.mp4", ".hidden/e.mp4", "a/notes.txt", "a/p.jpg"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).touch()
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "f.avi").touch()
    (tmp_path / "all" / "far").symlink_to(tmp_path / "far")
    assert videos.video_files(tmp_path / "all") == ["a/b/d.webm", "a/c.MKV", "b.mp4", "far/f.avi"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none holds no video: no file ends in .mp4, .mkv"):
        videos.video_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no folder"): videos.video_files(tmp_path / "nowhere")

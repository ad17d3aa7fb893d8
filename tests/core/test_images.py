"""Images: rare modes, orientation, files cut anywhere, endings, links."""
import pickle

import numpy as np
import pytest
from examples import paint
from PIL import Image

from cion_nb.core import images
from cion_nb.core.images import open_image, to_rgb, UnreadableImage
from cion_nb.core.samples import read_folder, read_tracklets

# ---- images ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, suffix",
                         [("1", "png"), ("L", "jpg"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"),
                          ("CMYK", "tif"),
                          ("YCbCr", "jpg"), ("I;16", "png"), ("I;16", "tif"), ("I", "tif"), ("RGB", "bmp"),
                          ("RGB", "webp"), ("L", "ppm")])
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    if mode in ("I;16", "I"): image = Image.fromarray(np.full((16, 8), 128 * 257, {"I": np.int32}.get(mode, np.uint16)))
    else: image = Image.new("RGB", (8, 16), (128, 128, 128)).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    seen = open_image(tmp_path / f"x.{suffix}")
    assert seen.mode == "RGB" and seen.size == (8, 16)
    assert abs(np.asarray(seen).mean() - 128) < (130 if mode == "1" else 4)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, turn):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1))
    # the transposition that a viewer undoes
    there = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    (picture if there is None else picture.transpose(there)).save(tmp_path / "x.png", exif=exif)
    seen = open_image(tmp_path / "x.png")
    assert seen.size == (64, 128) and (np.asarray(seen) == np.asarray(picture)).all()
    assert to_rgb(seen).size == seen.size                                              # turned once


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
def test_a_file_cut_anywhere_is_whole_or_unreadable(tmp_path, suffix):
    paint(tmp_path / f"x.{suffix}", size=(16, 32))
    data, whole = (tmp_path / f"x.{suffix}").read_bytes(), np.asarray(open_image(tmp_path / f"x.{suffix}"))
    unreadable = 0
    for n in np.linspace(0, len(data) - 1, 40).astype(int):
        (tmp_path / "cut").write_bytes(data[:n])
        try: np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "cut")), whole)
        except UnreadableImage as e:
            unreadable += 1
            assert e.reason and e.path.endswith("cut")
    assert unreadable >= 37  # the very end of a file may carry no pixels


def test_unreadable_images_say_why_and_cross_processes(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    (tmp_path / "dir.jpg").mkdir()
    for name, why in (("f.tif", "floating-point"), ("dir.jpg", "directory"), ("none.jpg", "no such file")):
        with pytest.raises(UnreadableImage, match=why): open_image(tmp_path / name)
    e = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "zero bytes")))
    assert isinstance(e, OSError) and (e.path, e.reason, str(e)) == ("a.jpg", "zero bytes", "a.jpg: zero bytes")


def test_images_of_every_ending_are_read_or_counted(tmp_path):
    for s in (".jpg", ".JPEG", ".jpe", ".jfif", ".PNG", ".gif", ".tif", ".webp"):
        (tmp_path / "v/t").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"v/t/{len(s)}{s[1:]}_1{s}").touch()
    for s in ("0_1.heic", "0_2.HEIC", "0_3.mp4", "Thumbs.db", ".DS_Store", "notes.txt"): (tmp_path / "v/t" / s).touch()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "x.jpg").touch()
    with pytest.warns(UserWarning,
                      match=r"3 files left out: 2 .heic, 1 .mp4 \(convert it to JPEG, or install pillow-heif"):
        table = read_folder(tmp_path, "**/*_{frame}.*")
    assert len(table) == 8 and table.attrs["left_out"] == {".heic": 2, "hidden": 2, ".mp4": 1, ".db": 1, ".txt": 1}
    (tmp_path / "h").mkdir()
    (tmp_path / "h/a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    for read in (read_tracklets, lambda r: read_folder(r, "*")):
        with pytest.raises(ValueError, match="no images.*1 .heic"): read(tmp_path / "h")
    with pytest.raises(UnreadableImage, match="pillow-heif"): open_image(tmp_path / "h/a.heic")


def test_links_are_followed_once_and_real_folders_win(tmp_path):
    paint(tmp_path / "z/t/1.jpg")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "out").mkdir()
    paint(tmp_path.parent / f"{tmp_path.name}-other" / "2.jpg")
    (tmp_path / "out/there").symlink_to(tmp_path.parent / f"{tmp_path.name}-other")
    assert images.list_images(tmp_path) == ["out/there/2.jpg", "z/t/1.jpg"]


def test_deep_and_clear_images(tmp_path):
    ramp = np.linspace(0, 1, 512).reshape(32, 16)
    want = (ramp * 255).round()
    for bits in (8, 10, 12, 14, 16):
        Image.fromarray((ramp * (2**bits - 1)).round().astype(np.uint16)).save(tmp_path / f"{bits}.png")
        assert abs(np.asarray(open_image(tmp_path / f"{bits}.png"))[..., 0] - want).max() <= 1
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "32.tif")
    with pytest.raises(UnreadableImage, match="no known range"): open_image(tmp_path / "32.tif")
    for alpha, seen in ((0, images._CLEAR), (255, (255, 0, 255))):
        Image.new("RGBA", (4, 4), (255, 0, 255, alpha)).save(tmp_path / "c.png")
        assert open_image(tmp_path / "c.png").getpixel((0, 0)) == seen
    Image.new("P", (4, 4), 0).save(tmp_path / "p.png", transparency=0)
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == images._CLEAR

"""Heads on a sheet, blurred where that is asked: only the top rows, only on the sheet."""
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from cion_nb.core.samples import make_samples
from cion_nb.identities import explain as module
from cion_nb.identities.explain import identity_sheet

SHARES = [.01, .2, .25, .5, 1.]


@pytest.fixture
def crops(tmp_path):
    "Four images of noise as large as a sheet draws them, and one that it makes smaller."
    rng = np.random.default_rng(0)
    sizes = [(96, 48)] * 4 + [(256, 128)]
    for i, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path, make_samples([f"{i}.png" for i in range(5)], tracklet=0, frame=range(5))


def pixels(figure):
    data = BytesIO()
    figure.savefig(data, format="png")
    return np.asarray(Image.open(data).convert("RGB")).astype(int)


@pytest.mark.parametrize("share", SHARES)
def test_only_the_top_rows_change(crops, share):
    root, _ = crops
    for name in ("0.png", "4.png"):
        sharp, _ = module._crop(root, name)
        blurred, _ = module._crop(root, name, share)
        rows = int(np.ceil(share * 96))
        changed = (sharp != blurred).any((1, 2))
        assert changed[:rows].all() and not changed[rows:].any()


@pytest.mark.parametrize("share", [.2, .25, .5])
def test_little_is_left_of_what_is_blurred(crops, share):
    root, _ = crops
    rows = int(np.ceil(share * 96))
    sharp, blurred = (module._crop(root, "0.png", *more)[0][:rows].astype(float) for more in ((), (share,)))
    assert blurred.std() < .15 * sharp.std(), "noise of single pixels is gone"


def test_nothing_is_blurred_unless_asked(crops):
    root, samples = crops
    sheet = pixels(identity_sheet(np.zeros(5, int), samples, root))
    assert (sheet == pixels(identity_sheet(np.zeros(5, int), samples, root, blur_heads=0))).all()
    assert (sheet != pixels(identity_sheet(np.zeros(5, int), samples, root, blur_heads=.25))).any()
    assert (module._crop(root, "0.png")[0] == np.asarray(Image.open(root / "0.png"))).all()


def test_a_sheet_changes_at_the_heads_and_no_file_changes(crops):
    root, samples = crops
    before = [(root / path).read_bytes() for path in samples.path]
    sharp, blurred = (pixels(identity_sheet(np.zeros(5, int), samples, root, blur_heads=share)) for share in (0, .25))
    changed = np.flatnonzero((sharp != blurred).any((1, 2)))
    drawn = np.flatnonzero((sharp.std(1) > 40).all(1))                # rows with noise
    assert len(changed) and changed.max() - drawn.min() < .3 * (drawn.max() - drawn.min())
    assert [(root / path).read_bytes() for path in samples.path] == before


@pytest.mark.parametrize("share", [-.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(crops, share):
    root, samples = crops
    with pytest.raises(ValueError, match="blur_heads=.*a share of the crop's height, 0 to 1"):
        identity_sheet(np.zeros(5, int), samples, root, blur_heads=share)

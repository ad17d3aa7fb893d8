"""Tracklets with masks of their parts, and recipes of VILLS that end in seconds."""
import numpy as np
from PIL import Image

from cion_nb.core.samples import make_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.semantics.local_semantics import PartSource, write_parts

PEOPLE, CAMERAS, FRAMES = 8, 2, 5
ROWS = dict(head=slice(4, 14), upper=slice(14, 38), lower=slice(38, 60))


class Bands(PartSource):
    "Three bands, one below the other; the last frame of a tracklet has no lower body, and one person no part at all."
    settings = dict(source="bands")

    def parts(self, images, samples=None):
        masks = np.zeros((len(images), 3, 64, 32), bool)
        for a, rows in enumerate(ROWS.values()): masks[:, a, rows, 8:24] = True
        masks[samples["frame"].to_numpy() == FRAMES - 1, 2] = False
        masks[samples["pid"].to_numpy() == PEOPLE - 1] = False
        return masks, masks.any(1)


def make(root):
    "Eight people in two cameras, a tracklet each, of five frames; the first half trains. The parquet file."
    rows, rng = [], np.random.default_rng(0)
    colours = rng.integers(30, 226, (PEOPLE, 3, 3))
    for pid in range(PEOPLE):
        for camid in range(CAMERAS):
            for frame in range(FRAMES):
                picture = np.full((64, 32, 3), 90 + 40 * camid) + rng.normal(0, 12, (64, 32, 3))
                where = slice(8 + frame % 2, 24 + frame % 2)
                for colour, band in zip(colours[pid], ROWS.values()): picture[band, where] = colour
                name = f"{pid}_{camid}_{frame}.png"
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / name)
                split = "train" if pid < PEOPLE // 2 else "query" if camid == 0 else "gallery"
                rows.append(dict(path=name, pid=pid, camid=camid, video=f"c{camid}", frame=frame, split=split,
                                 tracklet=CAMERAS * pid + camid))
    samples = make_samples(**{key: [row[key] for row in rows] for key in rows[0]})
    write_samples(samples, root / "samples.parquet")
    write_parts(samples, root, Bands(), root / "parts")
    return root / "samples.parquet"


QUICK = dict(epochs=2, images_per_epoch=24, batch_size=8, clip_batch=4, n_local=1, frames=3, latents=4,
             resampler_depth=1, resampler_heads=2, dim_head=16, out_dim=32, head_hidden=32, head_bottleneck=16,
             warmup_epochs=0, precision="fp32", channels_last=False, checkpoint_minutes=60)


def asked(data, **changes):
    parts = dict(parts=str(data.parent / "parts")) if "parts" not in changes else {}
    return recipe("vills", "tiny", **dict(data=str(data)) | parts | QUICK | changes)


def only(*terms): return {f"lambda_{term}": 0. for term in ("coarse", "lse", "temp", "adapt") if term not in terms}


class Alone:
    "An accelerator of one process."
    num_processes, process_index, mixed_precision = 1, 0, "no"
    @staticmethod
    def autocast():
        from contextlib import nullcontext
        return nullcontext()

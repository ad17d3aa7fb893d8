"""Denoised folders: requests computed once, interrupted saves, damage, tables that do not fit, bad settings."""
import json

import numpy as np
import pandas as pd
import pytest
from examples import angles, PREFIXES

from cion_nb.core.samples import make_samples
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities import denoise as module
from cion_nb.identities.denoise import denoise, denoise_shard, Denoised

# ---------------------------------------------------------------- keeping a result

def test_save_and_load(tmp_path):
    x, samples = feature_world(60, seed=1)
    got = denoise(x, samples, half_width=None)
    folder = got.save(tmp_path / "result")
    back = Denoised.load(folder)
    assert np.array_equal(back.labels, got.labels) and back.labels.dtype == np.int64
    assert back.parameters == got.parameters
    for name in ("provenance", "tracklets", "links", "noise"):
        pd.testing.assert_frame_equal(getattr(back, name), getattr(got, name), check_index_type=False)
    assert np.array_equal(back.labels_after("video"), got.labels_after("video")) and repr(back) == repr(got)


def test_out_computes_a_request_once(tmp_path, monkeypatch):
    x, samples = feature_world(40, seed=1)
    first = denoise(x, samples, out=tmp_path / "a")
    monkeypatch.setattr(module, "do_parts", None)                      # a second computation would fail
    assert np.array_equal(denoise(x, samples, out=tmp_path / "a").labels, first.labels)
    # columns it does not read
    assert np.array_equal(denoise(x, samples.assign(pid=-1), out=tmp_path / "a").labels, first.labels)


@pytest.mark.parametrize("kw, message", [
    (dict(sigma_cst=.3), "sigma_cst=0.2 there, 0.3 asked for"), (dict(levels=("tracklet",)), "levels="),
    (dict(half_width=3), "half_width=1000 there, 3 asked for"), (dict(link="reciprocal"), "link='threshold' there"),
])
def test_the_finished_result_of_another_request_stays(tmp_path, kw, message, monkeypatch):
    x, samples = feature_world(40, seed=1)
    first = denoise(x, samples, out=tmp_path)
    monkeypatch.setattr(module, "do_parts", None)
    with pytest.raises(FileExistsError, match=f"another request.*{message}.*choose another out="):
        denoise(x, samples, out=tmp_path, **kw)
    with pytest.raises(FileExistsError, match="another request"):
        denoise_shard(x, samples, tmp_path, "videos", 0, 2, **kw)
    assert np.array_equal(Denoised.load(tmp_path).labels, first.labels)


def test_the_finished_result_of_other_features_or_another_table_stays(tmp_path):
    x, samples = feature_world(40, seed=1)
    denoise(x, samples, out=tmp_path)
    y = x.copy()
    y[3] = x[4]
    message = "other features or another table"
    with pytest.raises(FileExistsError, match=message): denoise(y, samples, out=tmp_path)
    later = samples.assign(frame=samples.frame + 1)
    with pytest.raises(FileExistsError, match=message): denoise(x, later, out=tmp_path)


def test_an_interrupted_save_is_no_result(tmp_path, monkeypatch):
    x, samples = feature_world(40, seed=1)
    got = denoise(x, samples)
    real = module.write_json
    def stop(path, obj):
        if path.name == "denoised.json": raise KeyboardInterrupt
        return real(path, obj)
    monkeypatch.setattr(module, "write_json", stop)
    with pytest.raises(KeyboardInterrupt): denoise(x, samples, sigma_cst=.4, out=tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="unfinished|no finished"): Denoised.load(tmp_path / "a")
    monkeypatch.undo()
    assert np.array_equal(denoise(x, samples, out=tmp_path / "a").labels, got.labels)


def test_a_damaged_result_is_named(tmp_path):
    x, samples = feature_world(40, seed=1)
    folder = denoise(x, samples).save(tmp_path / "a")
    pd.read_parquet(folder / "links.parquet").iloc[:-1].to_parquet(folder / "links.parquet")
    with pytest.raises(ValueError, match="links.parquet"): Denoised.load(folder)
    assert "parameters" in json.loads((folder / "denoised.json").read_text())


# ---------------------------------------------------------------- refusals, and odd tables with a meaning

def test_memory_map_and_float16(tmp_path):
    x, samples = feature_world(60, seed=1)
    np.save(tmp_path / "f.npy", x)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    assert x.dtype == np.float16
    assert np.array_equal(denoise(mapped, samples).labels, denoise(x.astype(np.float64) * 7, samples).labels)


@pytest.mark.parametrize("kw, message", [
    (dict(sigma_cst=-.1), "sigma_cst"), (dict(sigma_drm=2.01), "sigma_drm"), (dict(half_width=-1), "half_width"),
    (dict(half_width=2.5), "half_width"), (dict(half_width=True), "half_width"),
    (dict(levels=("track",)), "unknown level 'track'"), (dict(levels=("video", "tracklet")), "order"),
    (dict(levels=("video", "video")), "once"), (dict(link="nearest"), "unknown link 'nearest'"),
    (dict(sigma_cst="0.2"), "sigma_cst"), (dict(sigma_drm=None), "sigma_drm"), (dict(sigma_cst=True), "sigma_cst"),
    (dict(levels=5), "levels"), (dict(link="reciprocal", eps="x"), "eps"), (dict(link="reciprocal", k1=2), "k1"),
    (dict(k1=0), "k1"), (dict(k2=0), "k2"), (dict(k1=5, k2=6), "k2 = 6"), (dict(eps=1), "eps"),
    (dict(min_samples=0), "min_samples"),
    (dict(workers="2"), "workers"), (dict(workers=0), "workers"), (dict(device="cudaa"), "device"),
    (dict(centre="v"), "unknown centre"), (dict(cannot_link="time"), "unknown cannot_link"),
    (dict(measure="yes"), "unknown measure"),
])
def test_requests_without_meaning(kw, message):
    x, samples = feature_world(10, seed=1)
    with pytest.raises(ValueError, match=message): denoise(x, samples, **kw)


def test_one_level_as_a_word():
    x, samples = feature_world(10, seed=1)
    assert np.array_equal(denoise(x, samples, levels="tracklet").labels,
                          denoise(x, samples, levels=("tracklet",)).labels)


def test_tables_that_do_not_fit():
    x, samples = feature_world(12, dim=8, seed=1)
    with pytest.raises(ValueError, match=f"{len(x) - 1} feature rows but {len(x)} samples"): denoise(x[:-1], samples)
    with pytest.raises(ValueError, match="matrix"): denoise(x[:, 0], samples)
    with pytest.raises(ValueError, match="no column frame"): denoise(x, samples.drop(columns="frame"))
    with pytest.raises(ValueError, match="no tracklet.*rows 2, 7"):
        denoise(x, samples.assign(tracklet=np.where(np.isin(np.arange(len(x)), [2, 7]), -1, samples.tracklet)))
    with pytest.raises(ValueError, match="tracklet.*11.*'video00000', 'elsewhere'"):
        denoise(x, samples.assign(video=samples.video.where(samples.index < len(x) - 1, "elsewhere")))
    for value, word in ((0, "zero"), (np.nan, "NaN")):
        bad = x.copy()
        bad[[3, 20]] = value
        with pytest.raises(ValueError, match=f"{word}.*rows 3, 20"): denoise(bad, samples)


@pytest.mark.parametrize("levels", PREFIXES)
def test_empty_table(levels, tmp_path):
    got = denoise(np.empty((0, 5), np.float32), feature_world(3)[1].iloc[:0], levels=levels, out=tmp_path / "e")
    assert len(got.labels) == 0 and got.labels.dtype == np.int64 and (got.noise.n_S == 0).all()
    assert "0 images" in repr(got)
    assert list(Denoised.load(tmp_path / "e").provenance.columns) == list(
        feature_world(3) and denoise(*feature_world(3)).provenance.columns)


def test_single_tracklet_and_single_images():
    x = angles(0, 90, 180)
    # nowhere else to go: discarded, with no distance
    assert denoise(x, make_samples(list("abc"), tracklet=0)).labels.tolist().count(-1) == 2
    assert denoise(x, make_samples(list("abc"), tracklet=0)).provenance.distance.isna().all()
    one = denoise(x, make_samples(list("abc"), tracklet=[4, 5, 6]))
    assert one.labels.tolist() == [0, 1, 2] and (one.provenance.state == "kept").all()
    assert one.provenance.distance.isna().all()
    assert denoise(x[:1], make_samples("a", tracklet=3)).labels.tolist() == [0]


def test_duplicate_images():
    """The same row again: at distance 0 of itself, in the same tracklet one more vote, in another tracklet a reason to
    merge.
    """
    x = angles(0, 0, 0, 100)
    assert denoise(x, make_samples(["a", "a", "a", "b"], tracklet=0, frame=[0, 0, 0, 1])).labels.tolist() == [
        0, 0, 0, -1]
    assert denoise(x, make_samples(["a", "a", "a", "b"], tracklet=[0, 1, 2, 3], frame=0)).labels.tolist() == [
        0, 0, 0, 1]


# ---------------------------------------------------------------- folders that belong to somebody

def test_files_of_the_user_stay(tmp_path):
    x, samples = feature_world(40, seed=1)
    for name in ("work/thesis.tex", ".my.tmp.txt", ".provenance.notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    denoise(x, samples, out=tmp_path)
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == [".my.tmp.txt", ".provenance.notes",
                                                                          "denoised.json", "links.parquet",
                                                                          "provenance.parquet", "thesis.tex",
                                                                          "tracklets.parquet"]
    (tmp_path / "b" / "denoise_work").mkdir(parents=True)
    (tmp_path / "b" / "denoise_work" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not made by denoise"): denoise(x, samples, out=tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"): denoise(x, samples, out=tmp_path / "file")


def test_one_process_at_a_time(tmp_path, monkeypatch):
    x, samples = feature_world(40, seed=1)
    real = module._denoised
    def meanwhile(*a):
        with pytest.raises(ValueError, match="another process"): denoise(x, samples, sigma_cst=.5, out=tmp_path)
        return real(*a)
    monkeypatch.setattr(module, "_denoised", meanwhile)
    denoise(x, samples, out=tmp_path)
    assert not (tmp_path / ".denoise.lock").exists()


def test_all_bad_rows_are_named_and_nothing_is_left(tmp_path):
    x, samples = feature_world(3000, dim=8, seed=1)
    bad = x.copy()
    bad[10] = 0
    bad[40_000] = np.nan
    with pytest.raises(ValueError, match="rows 10, 40000"): denoise(bad, samples, out=tmp_path)
    assert not (tmp_path / "denoise_work").exists()


def test_frames_that_restart_in_every_tracklet_forbid_nothing():
    x, samples = feature_world(60, seed=1)
    restarted = samples.assign(frame=samples.groupby("tracklet").cumcount().astype("int32"))
    with pytest.raises(ValueError, match="begin at the same frame"): denoise(x, restarted, cannot_link="frames")
    denoise(x, samples, cannot_link="frames")


@pytest.mark.parametrize("name", ["part00000.npz", "part00000.sums.npy"])
def test_a_damaged_piece_is_named(tmp_path, name):
    from cion_nb.identities.parts import Store
    store = Store(tmp_path)
    store.put("part00000", sums=np.ones((3, 4)), kept=np.arange(3))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"{name} is damaged.*run denoise again"):
        store.get("part00000")
        store.sums("part00000")

"""A result and the table that was denoised: rows in another order, another table, results that remember none."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cion_nb.core.samples import make_samples, write_samples
from cion_nb.data.feature_worlds import feature_world
from cion_nb.identities.denoise import check_same_rows, denoise, Denoised, table_hash
from cion_nb.identities.explain import explain, export, identity_sheet
from cion_nb.training.pretrain import _denoised_labels

USES = dict(
    export=lambda result, samples, folder: export(result, samples, folder / "ids.csv", "csv"),
    explain=lambda result, samples, folder: explain(result, row=0, samples=samples),
    explain_identity=lambda result, samples, folder: explain(result, identity=0, samples=samples),
    identity_sheet=lambda result, samples, folder: identity_sheet(result, samples, folder, rows=1, columns=2),
    sheet_of_labels=lambda result, samples, folder: identity_sheet(
        result.labels, samples, folder, provenance=result.provenance, rows=1, columns=2),
)


@pytest.fixture(scope="module")
def world():
    x, samples = feature_world(20, seed=1)
    return x, samples, denoise(x, samples, measure=False)


def no_memory(result):
    "As results were before they remembered their table."
    return replace(result, parameters={k: v for k, v in result.parameters.items() if k != "table"})


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("is_old", [False, True])
def test_rows_in_another_order_are_refused(world, use, is_old, tmp_path):
    _, samples, result = world
    if is_old: result = no_memory(result)
    with pytest.raises(ValueError, match="another order: row 0 is of tracklet .*give the table that was denoised"):
        USES[use](result, samples.iloc[::-1].reset_index(drop=True), tmp_path)
    assert not list(tmp_path.iterdir())
    USES[use](result, samples, tmp_path)


@pytest.mark.parametrize("use", [name for name in USES if name != "sheet_of_labels"])
@pytest.mark.parametrize("column", ["path", "frame"])
def test_another_order_inside_a_tracklet_is_refused(world, use, column, tmp_path):
    _, samples, result = world
    inside = np.flatnonzero(samples.tracklet == samples.tracklet[0])[:2]
    swapped = samples.copy()
    swapped.loc[inside, column] = samples[column].to_numpy()[inside[::-1]]
    with pytest.raises(ValueError, match=f"agree row by row, column '{column}' does not"):
        USES[use](result, swapped, tmp_path)


def test_another_number_of_rows_is_refused(world):
    _, samples, result = world
    with pytest.raises(ValueError, match=f"{len(samples)} rows were denoised, samples has {len(samples) - 1}"):
        explain(result, row=0, samples=samples.iloc[:-1])


def test_other_columns_an_index_and_types_do_not_matter(world, tmp_path):
    _, samples, result = world
    same = samples.assign(pid=3, extra=1, path=samples.path.astype(object), frame=samples.frame.astype(float),
                          video=samples.video.astype("category"))
    check_same_rows(same.set_index(np.arange(len(same))[::-1]), result.provenance, result.parameters)


def test_the_hash_does_not_depend_on_blocks(world):
    _, samples, _ = world
    assert table_hash(samples) == table_hash(samples, block=7) != table_hash(samples.iloc[::-1])


def test_a_saved_result_remembers_its_table(world, tmp_path):
    x, samples, result = world
    denoise(x, samples, measure=False, out=tmp_path)
    assert Denoised.load(tmp_path).parameters["table"] == result.parameters["table"] == table_hash(samples)


def test_an_empty_table_and_an_empty_result_belong_together():
    samples = make_samples([])
    result = denoise(np.empty((0, 4), np.float32), samples)
    check_same_rows(samples, result.provenance, result.parameters)


def test_a_denoising_run_whose_table_was_exchanged_gives_no_labels(world, tmp_path):
    from types import SimpleNamespace
    _, samples, result = world
    result.save(tmp_path)
    run = SimpleNamespace(folder=tmp_path, name="denoise-x")
    write_samples(samples, tmp_path / "samples.parquet")
    assert np.array_equal(_denoised_labels(samples, run), result.labels)
    write_samples(samples.iloc[::-1], tmp_path / "samples.parquet")
    with pytest.raises(ValueError, match="another order"): _denoised_labels(samples, run)


def test_ten_million_rows_would_cost_about_a_second():
    n = 200_000
    samples = make_samples(pd.Series(np.arange(n)).map("video/00/{:08d}.jpg".format), tracklet=np.arange(n) // 9)
    from time import perf_counter
    start = perf_counter()
    table_hash(samples)
    assert perf_counter() - start < 1                             # a fiftieth of the rows, on any machine

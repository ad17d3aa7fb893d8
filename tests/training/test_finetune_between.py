"""Tests between epochs: they are logged, and the training does not know of them."""
import torch
from trainings import quick

from cion_nb.core.runs import run_hash
from cion_nb.core.weights import read_checkpoint
from cion_nb.training.finetune import finetune, FineTuning


def test_a_look_at_the_test_set_changes_no_weight(people, runs):
    plain, looked = finetune(quick(people, epochs=4)), finetune(quick(people, epochs=4, test_every=1))
    assert plain.name != looked.name and run_hash(quick(people, epochs=4, test_every=0)) == run_hash(plain.recipe)
    one, other = (read_checkpoint(run.folder / "backbone.safetensors") for run in (plain, looked))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    rows = [row for row in looked.read_log() if "test_mAP" in row]
    assert [row["epoch"] for row in rows] == [1, 2, 3]                         # the last state is in `result`
    assert all(0 <= row["test_rank1"] <= 1 for row in rows) and not list(looked.folder.glob("test-[0-9]*"))
    assert not any("test_mAP" in row for row in plain.read_log())


def test_where_it_stops_to_look(people, runs):
    task = FineTuning(quick(people, epochs=4, test_every=3))
    per_epoch = task.total() / 4
    assert [task.horizon(round(share * per_epoch)) for share in (0, 2.9, 3, 3.9)] == [
        3 * per_epoch, 3 * per_epoch, 6 * per_epoch, 6 * per_epoch]
    assert FineTuning(quick(people, epochs=4)).horizon(10) == float("inf")

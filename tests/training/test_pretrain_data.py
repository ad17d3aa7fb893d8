"""Data of pre-training: images that cannot be read, identities of a denoising run, other data."""
import shutil
import time

import numpy as np
import pytest
from trainings import asked

from cion_nb.core.runs import Run
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.training.pretrain import identity_labels, pretrain


@pytest.mark.slow("trains networks")
def test_images_beside_their_table_are_part_of_a_runs_name(people, runs, tmp_path):
    from cion_nb.core import runs as room
    root = shutil.copytree(people.parent, tmp_path / "own")
    r = asked(root / "samples.parquet")
    first = Run(r).name
    (root / "3_1_2.png").write_bytes(b"other")
    room._seen_inputs.clear()
    second = Run(r).name
    (root / "notes.txt").write_text("nothing to do with it")
    room._seen_inputs.clear()
    assert first != second == Run(r).name


@pytest.mark.slow("trains networks")
def test_a_wrong_root_is_one_error(people, runs):
    with pytest.raises(FileNotFoundError,
                       match="none of the first 96 images can be read under .*nowhere.*Is that the root"):
        pretrain(asked(people, data_root="/nowhere"))


@pytest.mark.slow("trains networks")
def test_a_broken_image_is_replaced_and_counted(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "broken")
    (root / "3_1_2.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="3_1_2.png"): run = pretrain(asked(root / "samples.parquet"))
    assert run.result["unreadable"] == 1


@pytest.mark.slow("trains networks")
def test_identities_of_a_denoising_run_join_by_path(people, runs):
    from cion_nb.identities.denoise import denoise
    samples = read_samples(people)
    kept = samples.drop(index=[0, 5]).reset_index(drop=True)            # extraction skipped two images
    x = np.random.default_rng(0).normal(size=(len(kept), 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    run = Run(recipe("denoise", "tiny"))
    with run.computing():
        found = denoise(x, kept, sigma_cst=2, sigma_drm=0)
        found.save(run.folder)
        write_samples(kept, run.folder / "samples.parquet")
        run.finish({})
    labels = identity_labels(samples, run.recipe)
    assert labels[0] == labels[5] == -1 and (np.delete(labels, [0, 5]) == found.labels).all()


@pytest.mark.slow("trains networks")
def test_a_changed_input_is_another_run(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "copy")
    first = Run(asked(root / "samples.parquet")).name
    time.sleep(.01)
    t = read_samples(root / "samples.parquet")
    write_samples(t.iloc[:-1], root / "samples.parquet")
    assert Run(asked(root / "samples.parquet")).name != first


@pytest.mark.slow("trains networks")
def test_an_identity_without_a_readable_image_sits_out(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "gone")
    (root / "3_1_2.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="3_1_2.png"): run = pretrain(asked(root / "samples.parquet", "dino"))
    assert run.result["train_images"] == 95 and run.result["unreadable"] == 1


@pytest.mark.slow("trains networks")
def test_identities_of_other_data_are_refused(people, runs):
    run = Run(recipe("denoise", "tiny"))
    from cion_nb.identities.denoise import denoise
    other = read_samples(people).assign(path=lambda t: "elsewhere/" + t.path)
    x = np.random.default_rng(0).normal(size=(len(other), 8))
    with run.computing():
        denoise(x, other, sigma_cst=2, sigma_drm=0).save(run.folder)
        write_samples(other, run.folder / "samples.parquet")
        run.finish({})
    with pytest.raises(ValueError, match="other data"): identity_labels(read_samples(people), run.recipe)

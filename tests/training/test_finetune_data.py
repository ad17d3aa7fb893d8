"""Data that fine-tuning meets: people twice or nearly alone, unknown cameras, odd images, lists of one's own; what
cannot work is named."""
import json
import time

import numpy as np
import pandas as pd
import pytest
from trainings import changed, quick

from cion_nb.core.runs import Run
from cion_nb.core.samples import read_samples, write_samples
from cion_nb.core.settings import recipe
from cion_nb.core.store import Features
from cion_nb.models.backbones import create_backbone, save_backbone
from cion_nb.retrieval.evaluate import evaluate
from cion_nb.training.finetune import finetune, part_of


@pytest.mark.slow("trains networks")
def test_one_person_is_an_error(people, runs, tmp_path):
    t = read_samples(people)
    t.loc[t.split == "train", "pid"] = 1
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "one")
    write_samples(t, root / "samples.parquet")
    with pytest.raises(ValueError, match="two people"):
        finetune(recipe("finetune", "tiny", data=str(root / "samples.parquet")))


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("changes,word", [(dict(optimizer="adamm"), "choose 'sgd' or 'adam'"),
                                          (dict(epochs=0), "must be positive"),
                                          (dict(batch_size=0), "must be positive")])
def test_settings_that_cannot_work_are_refused(people, runs, changes, word):
    with pytest.raises(ValueError, match=word): finetune(recipe("finetune", "tiny", data=str(people), **changes))


@pytest.mark.slow("trains networks")
def test_a_list_of_ones_own(people, runs, tmp_path, capsys):
    t = read_samples(people)
    t = t[t.split == "train"]
    (tmp_path / "pids.txt").write_text("3\n5\n\n")
    (tmp_path / "paths.txt").write_text("\n".join(t.path[:10]))
    (tmp_path / "bad.txt").write_text("1_1_0.png\nnobody.png\n")
    (tmp_path / "empty.txt").write_text("\n")
    assert set(part_of(t, keep_list=tmp_path / "pids.txt").pid) == {3, 5}
    assert part_of(t, keep_list=tmp_path / "paths.txt").path.tolist() == t.path[:10].tolist()
    with pytest.raises(ValueError, match="1 of 2 lines.*nobody.png"): part_of(t, keep_list=tmp_path / "bad.txt")
    with pytest.raises(ValueError, match="is empty"): part_of(t, keep_list=tmp_path / "empty.txt")
    # Notepad's; LUPerson's used_ids
    for name, raw in dict(marked="\ufeff3\r\n5\r\n".encode(), zeros=b"0003 \n0005 \n").items():
        (tmp_path / name).write_bytes(raw)
        assert set(part_of(t, keep_list=tmp_path / name).pid) == {3, 5}
    deep = t.assign(path="train/" + t.path)
    # the second as LUPerson's used_ims
    for name, text in dict(windows="train\\1_1_0.png\ntrain\\2_1_3.png\n",
                           names="1_1_0.png; 0; 0 \n2_1_3.png; 1; 0 \n").items():
        (tmp_path / name).write_text(text)
        assert part_of(deep, keep_list=tmp_path / name).path.tolist() == ["train/1_1_0.png", "train/2_1_3.png"]
    twice = pd.concat([deep, t.assign(path="more/" + t.path)])
    # a name in two folders
    with pytest.raises(ValueError, match="2 of 2 lines name neither a path nor a pid"):
        part_of(twice, keep_list=tmp_path / "names")
    (tmp_path / "gbk.txt").write_bytes("人.png\n".encode("gbk"))
    with pytest.raises(ValueError, match="gbk.txt is no UTF-8.*iconv"): part_of(t, keep_list=tmp_path / "gbk.txt")
    capsys.readouterr()
    part_of(t, keep_list=tmp_path / "pids.txt")
    assert "pids.txt: 16 of 64 training images are listed, 2 of 8 people; the others sit out" in capsys.readouterr().err
    r = quick(people, keep_list=str(tmp_path / "pids.txt"), epochs=1, batch_size=8, images_per_epoch=8)
    run = finetune(r)
    assert run.result["train_ids"] == 2 and run.result["train_images"] == 16 and run.result["left_out_images"] == 48
    time.sleep(.02)
    (tmp_path / "pids.txt").write_text("3\n5\n7\n")
    from cion_nb.core import runs as room
    room._seen_inputs.clear()
    assert Run(r).name != run.name, "the list is an input: its content is in the name"


# Bad input

@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("changes,word",
                         [(dict(method="mgnn"), "did you mean 'mgn'"), (dict(jpm=True), "belong to method='transreid'"),
                          (dict(few_ids=1.5), "at most 1"), (dict(held_out=1.), "below 1"),
                          (dict(erasing_fill="white"), "choose 'pixel'"),
                          (dict(method="mgn", image_size=[64, 32]), "multiple of 96"),
                          (dict(method="mgn", backbone="vit_tiny"), "ResNet"),
                          (dict(method="transreid", backbone="resnet18", overlap=False, drop_path=None), "class token"),
                          (dict(overlap=True), "no convolutional patch stem"),
                          (dict(drop_path=.1, backbone="ghostnet_0_5"), "no drop path"),
                          (dict(protocol="markt"), "did you mean 'market'"),
                          (dict(keep_list="/nowhere.txt"), "nowhere.txt")])
def test_what_cannot_work_is_named(people, runs, changes, word):
    with pytest.raises((ValueError, FileNotFoundError), match=word): finetune(quick(people, **changes))


@pytest.mark.slow("trains networks")
def test_one_image_a_person_is_repeated(people, runs, tmp_path):
    "K = 4 of one image: the same image under other crops; a documented result, not an error."
    data = changed(people, tmp_path, lambda t, root: t[
        (t.split != "train") | ((t.frame == 0) & (t.camid == 1))].reset_index(drop=True))
    run = finetune(quick(data))
    assert run.result["train_images"] == run.result["train_ids"] == 8 and 0 < run.result["mAP"] <= 1


@pytest.mark.slow("trains networks")
def test_cameras_unknown_everywhere_remove_nothing(people, runs, tmp_path):
    data = changed(people, tmp_path, lambda t, root: t.assign(camid=-1))
    run = finetune(quick(data))
    f = Features.open(run.folder / "test-features")
    q = (f.samples.split == "query").to_numpy()
    assert run.result["mAP"] == pytest.approx(evaluate(f.x[q], f.x[~q], f.samples[q], f.samples[~q],
                                                       protocol="no_camera").mAP)


@pytest.mark.slow("trains networks")
def test_people_in_train_and_test_are_told(people, runs, tmp_path):
    # 11 and 12 become 1 and 2
    data = changed(people, tmp_path, lambda t, root: t.assign(pid=t.pid.where(t.pid < 11, t.pid - 10)))
    with pytest.warns(UserWarning, match="2 people are in the train split and among the queries .1, 2."):
        run = finetune(quick(data))
    assert run.result["people_in_both"] == 2 and finetune(quick(people)).result["people_in_both"] == 0


@pytest.mark.slow("trains networks")
def test_images_of_every_mode_and_a_truncated_one(people, runs, tmp_path):
    from PIL import Image
    def change(t, root):
        for name, mode in (("1_1_0.png", "L"), ("1_1_2.png", "RGBA"), ("1_2_0.png", "1")):
            Image.open(root / name).convert(mode).save(root / name)
        Image.fromarray(np.asarray(Image.open(root / "1_1_1.png").convert("L")).astype(np.uint16)
                        * 257).save(root / "1_1_1.png")
        Image.open(root / "1_2_1.png").convert("CMYK").save(root / "cmyk.jpg")
        t.loc[t.path == "1_2_1.png", "path"] = "cmyk.jpg"
        broken = root / "2_1_0.png"
        broken.write_bytes(broken.read_bytes()[:60])
        return t
    data = changed(people, tmp_path, change)
    with pytest.warns(UserWarning, match="2_1_0.png"): run = finetune(quick(data))
    assert run.result["unreadable"] == 1 and "2_1_0.png" in json.loads((run.folder / "unreadable.json").read_text())


@pytest.mark.slow("trains networks")
def test_weights_of_another_network_are_refused(people, runs, tmp_path):
    save_backbone(create_backbone("resnet18", (64, 32)), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold a resnet10_tiny_ibn"):
        finetune(quick(people, weights=str(tmp_path / "other.safetensors")))


@pytest.mark.slow("trains networks")
def test_what_cannot_be_tested_is_known_before_training(people, runs, tmp_path):
    for change, word in ((dict(protocol="clothes_changing"), "no column clothes"),
                         (dict(test_data="market1501"), "needs data_root")):
        with pytest.raises(ValueError, match=word): finetune(quick(people, **change))
    for name, keep, word in (("q", lambda t: t[t.split != "query"], "none of split query"),
                             ("m",
                              lambda t: t[(t.split != "gallery")
                                          | (t.pid == 11)][lambda t: (t.split != "query") | (t.pid == 12)],
                              "none of the 2 queries has a match")):
        (tmp_path / name).mkdir()
        data = changed(people, tmp_path / name, lambda t, root: keep(t).reset_index(drop=True))
        with pytest.raises(ValueError, match=word): finetune(quick(data))
    assert not list(runs.glob("*/checkpoints/seen-*"))


@pytest.mark.slow("trains networks")
def test_images_of_nobody_are_not_a_person(people, runs, tmp_path):
    data = changed(people, tmp_path, lambda t, root: t.assign(pid=t.pid.where(t.pid > 3, -1)))
    with pytest.warns(UserWarning, match="24 of 64 training images have no person"): run = finetune(quick(data))
    assert run.result["train_ids"] == 5 and run.result["train_images"] == 40


@pytest.mark.slow("trains networks")
def test_too_few_people_left_says_what_left_them(people, runs):
    with pytest.raises(ValueError, match="few_ids=0.1, .* leave 2 images of 2 people"):
        finetune(quick(people, few_ids=.1, few_images=.1))

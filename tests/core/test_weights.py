"""Files of weights: read without running what they hold, every remedy that an error names, files that are no
checkpoints."""
import argparse
import collections
import gzip
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import MODEL, TINY, wrap

from cion_nb.core.weights import read_checkpoint
from cion_nb.models.backbones import create_backbone, save_backbone
from cion_nb.models.checkpoints import load_backbone_weights


class Config(dict): "As yacs and mmcv have them."


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_numbers_load_and_remedies_work(tmp_path, zipped):
    "Both names of NumPy's module, numbers and arrays; other objects are left out by the names that the error gives."
    source, model, path = create_backbone(**TINY), create_backbone(**TINY), tmp_path / "best.pth.tar"
    rest = dict(a=np.float64(.8), b=np.float32(.5), c=np.int64(3), d=np.bool_(True), e=np.arange(3.), f=np.str_("x"),
                g=Path("logs"))
    torch.save(dict(state_dict=wrap(source, "module."), **rest), path, _use_new_zipfile_serialization=zipped)
    assert load_backbone_weights(model, path).share == 1
    back = read_checkpoint(path)
    assert all(np.array_equal(back[k], rest[k]) for k in "abcdef") and str(back["g"]) == "logs"
    torch.save(dict(state_dict=wrap(source, "module."), cfg=Config(lr=1)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="best.pth.tar holds Python objects") as e: load_backbone_weights(model, path)
    assert load_backbone_weights(model, path, allow=re.findall(r"allow=\['(.*?)'\]", str(e.value))[-1:]).share == 1


def lfs(path, source): path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def page(path, source): path.write_text("\ufeff\n<!DOCTYPE html><html>log in</html>")


def empty(path, source): path.write_bytes(b"")


def folder(path, source): path.mkdir()


def cut(path, source): path.write_bytes(source.read_bytes()[:5000])


def gzipped(path, source): path.write_bytes(gzip.compress(source.read_bytes()))


def archive(path, source):
    with zipfile.ZipFile(path, "w") as f: f.write(source, "weights/best.pth")


def script(path, source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(MODEL.eval(), torch.zeros(1, 3, 64, 32)), path)


@pytest.mark.parametrize("make, said", [(lfs, "a Git LFS pointer.*git lfs pull"), (page, "a web page"),
                                        (empty, "is empty: fetch it again"), (folder, "is a folder"),
                                        (cut, "cut off or damaged"),
                                        (gzipped, "compressed by gzip: unpack it"),
                                        (archive, "a zip file.*weights/best.pth"), (script, "a TorchScript archive")])
def test_files_that_are_no_checkpoints(tmp_path, make, said):
    "Each by its name, with what to do; and what can be done is done."
    torch.save(wrap(MODEL, "module."), tmp_path / "good.pth")
    make(tmp_path / "bad.pth", tmp_path / "good.pth")
    with pytest.raises(ValueError, match=f"bad.pth.*{said}") as e: load_backbone_weights(MODEL, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth"): create_backbone(**TINY, weights=tmp_path / "bad.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {gzipped: lambda: torch.load(gzip.open(tmp_path / "bad.pth")),
                 script: lambda: eval(re.search(r"torch\.jit\.load\(.*", str(e.value))[0]),
                 archive: lambda: zipfile.ZipFile(tmp_path / "bad.pth").extract("weights/best.pth", tmp_path)}.get(make)
        if given: assert load_backbone_weights(MODEL, given()).share == 1


@pytest.mark.parametrize("objects", ["Config(a=1)", "Names([1])", "Kinds([1])", "Built(2)", "BuiltAndFilled()",
                                     "Slots()", "[Config(a=1), Built(2)]", "[Config(a=1), Names([1])]", "whole"])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_remedy_that_is_named_works(tmp_path, monkeypatch, theirs, objects, zipped):
    """`allow=` where it helps; where it does not, saving the weights alone with the code that wrote them; then a file
    for `weights=`.
    """
    monkeypatch.chdir(tmp_path)
    path, model = tmp_path / "best.pth", create_backbone(**TINY)
    file = torch.nn.Sequential(collections.OrderedDict(backbone=MODEL)) if objects == "whole" else dict(
        state_dict=wrap(MODEL, "module."), rest=eval(objects, vars(theirs)))
    torch.save(file, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="best.pth holds Python objects") as e: load_backbone_weights(model, path)
    if allow := re.search(r"allow=(\[.*?\])", str(e.value)):
        allow = eval(allow[1])
        assert load_backbone_weights(model, path, allow=allow).share == 1
        assert len(read_checkpoint(path, allow=allow)) == 2
        saved = save_backbone(model, tmp_path / "saved.safetensors")
    else:
        assert objects in ("[Config(a=1), Names([1])]", "whole")
        load, save = re.search(r"installed: (x = .*?\)); (torch\.save\(.*, 'weights.pth'\))", str(e.value)).groups()
        exec(f"{load}; {save}", dict(torch=torch, KEY="state_dict"))
        saved = tmp_path / "weights.pth"
    again = create_backbone(**TINY, weights=saved)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), MODEL.state_dict().values()))


class Evil:
    def __reduce__(self): return (Path.touch, (Path("evil-was-here"),))


def test_nothing_is_unpickled_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, model = create_backbone(**TINY), create_backbone(**TINY)
    torch.save({"teacher": wrap(source, "backbone."), "args": argparse.Namespace(lr=0.1)}, tmp_path / "args.pth")
    assert load_backbone_weights(model, tmp_path / "args.pth").share == 1
    torch.save({"teacher": wrap(source, "backbone."), "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="run code"): load_backbone_weights(model, tmp_path / "evil.pth")
    (tmp_path / "legacy.pth").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "text.pth").write_text("404: not found")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "args.pth").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(
        save_backbone(source, tmp_path / "whole.safetensors").read_bytes()[:5000])
    for name in ("legacy.pth", "text.pth", "cut.pth", "cut.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint"):
            load_backbone_weights(model, tmp_path / name)
    assert not Path("evil-was-here").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        create_backbone(**TINY, weights=tmp_path / "none.pth")

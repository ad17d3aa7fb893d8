"""Files that leave: ONNX and TorchScript against the model, their cards, what is refused."""
import copy
import json
import os

import numpy as np
import pytest
import torch
from checkpoint_files import PAPER, released_file, rounding, synthetic, TINY
from torch import nn

from cion_nb.models import leaving
from cion_nb.models.architectures import InputSpec, list_backbones
from cion_nb.models.backbones import create_backbone
from cion_nb.models.checkpoints import load_backbone_weights
from cion_nb.models.leaving import export_onnx, export_torchscript

# Files that leave.
EXPORTED = PAPER if os.environ.get("CION_NB_EXPORT_ALL") else list_backbones(trial=True)["name"].tolist()
GAIN = 1.5                # of a trial member's drawn weights


def drawn(zoo, arch):
    "Weights that make features depend on the image: as released, or of a trial member's own entries."
    if arch in PAPER: return released_file(zoo, arch)[0]
    net = create_backbone(arch, (64, 32)).state_dict()
    return {k: torch.from_numpy(np.asarray(synthetic(k, tuple(v.shape), GAIN))) if v.is_floating_point() else v
            for k, v in net.items()}


@pytest.mark.slow("exports networks")
@pytest.mark.parametrize("arch", EXPORTED)
def test_export(zoo, arch, tmp_path):
    """ONNX through onnxruntime and TorchScript reloaded, under weights that make features depend on the image.
    The trial member of each family; CION_NB_EXPORT_ALL=1: all 32 at 256x128 (slow).
    """
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    size = (256, 128) if EXPORTED is PAPER else (64, 32)
    model = create_backbone(arch, size)
    load_backbone_weights(model, drawn(zoo, arch))
    before, mode = copy.deepcopy(model.state_dict()), model.training
    # these weights amplify rounding in RepViT, most of all in small images
    allowed = max(1e-3, 20 * rounding(model, size))
    onnx = export_onnx(model, tmp_path / "m.onnx", tolerance=allowed)
    script = export_torchscript(model, tmp_path / "m.pt", normalise=False, tolerance=allowed)
    print(f"| {arch} | {onnx.relative:.1e} | {script.relative:.1e} | {onnx.megabytes:.1f} | {script.megabytes:.1f} | "
          f"{onnx.spread:.2g} |")
    # GhostNet 1.3 rounds by 6e-3 of the distance between images by itself
    assert max(onnx.relative, script.relative) < min(allowed, 0.05) and onnx.spread > 1e-2
    assert model.training == mode and all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values())), "exporting changes nothing"
    assert json.loads((tmp_path / "m.onnx.json").read_text())["input"]["std"] == [1, 1, 1]
    assert script.input == model.input
    convolutions = lambda m: sum(isinstance(x, nn.Conv2d) for x in m.modules())
    fused = leaving._Deployed(model, True)
    if arch.startswith(("repvit", "fastvit")): assert convolutions(fused) < convolutions(model)


class Small(nn.Module):
    "A model in a few operations."
    def __init__(self, spec, factor=1.):
        super().__init__()
        self.input, self.embed_dim, self.factor, self.conv = spec, 4, factor, nn.Conv2d(3, 4, 3, 2)
    def forward(self, x):
        return self.conv(x).relu().mean((2, 3)) * (self.factor if torch.jit.is_tracing()
                                                   or torch.compiler.is_compiling() else 1)


@pytest.mark.slow("exports networks")
def test_exported_file_is_fed_as_the_card_says(tmp_path):
    """Pixels into the ONNX file with normalisation inside, and through `OnnxModel` by either contract, give the model's
    own features.
    """
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import onnxruntime

    from cion_nb.models.features import embed, OnnxModel
    model = Small(InputSpec(64, 32, mean=(.5, .4, .3), std=(.2, .3, .4)))
    images = list(np.random.default_rng(0).integers(0, 256, (4, 64, 32, 3), dtype=np.uint8))
    want = embed(model, images)
    for normalise in (True, False):
        report = export_onnx(model, tmp_path / "m.onnx", normalise=normalise)
        assert report.relative < 1e-4 and sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
        card = json.loads((tmp_path / "m.onnx.json").read_text())
        assert InputSpec(**card["input"]) == report.input and (report.input == model.input) == (not normalise)
        assert np.allclose(embed(OnnxModel(report.path, report.input), images), want, atol=1e-5)
        session = onnxruntime.InferenceSession(report.path)
        assert json.loads(session.get_modelmeta().custom_metadata_map["cion_nb"]) == card
        assert session.get_inputs()[0].shape[1:] == [3, 64, 32] and isinstance(session.get_inputs()[0].shape[0], str)


@pytest.mark.slow("exports networks")
def test_a_file_that_differs_is_not_kept(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for export, name in ((export_onnx, "m.onnx"), (export_torchscript, "m.pt")):
        with pytest.raises(ValueError, match="does not compute what the model computes"):
            export(Small(InputSpec(8, 4), factor=1.01), tmp_path / name)
        with pytest.raises(ValueError, match="ends in"): export(Small(InputSpec(8, 4)), tmp_path / "m.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow("exports networks")
def test_onnx_extra_is_named(monkeypatch, tmp_path):
    import builtins
    real = builtins.__import__
    def without(name, *args, **kw):
        if name == "onnxruntime": raise ImportError(name)
        return real(name, *args, **kw)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "cion_nb\[onnx\]"'):
        export_onnx(create_backbone(**TINY), tmp_path / "m.onnx")

"""Backbones with weights: ImageNet's, saved and loaded."""
import pytest
import timm
import torch

from cion_nb.models import checkpoints
from cion_nb.models.architectures import ARCHITECTURES, InputSpec
from cion_nb.models.backbones import create_backbone, load_backbone, save_backbone
from cion_nb.models.checkpoints import load_backbone_weights


@pytest.mark.slow("builds large networks")
@pytest.mark.parametrize("arch",
                         ["resnet18", "swin_tiny", "volo_d1", "convnext_tiny", "fastvit_s12", "edgenext_x_small",
                          "ghostnet_1_0", "standard_vit_tiny"])
def test_imagenet(monkeypatch, arch):
    """timm's pre-trained models fit ours (weights themselves are not fetched here), and without network the error says
    what to do.
    """
    real, asked = timm.create_model, {}
    def fetched(name, pretrained=False, **kw):
        if pretrained: asked["name"] = name
        return real(name, **kw)
    monkeypatch.setattr(checkpoints.timm, "create_model", fetched)
    model = create_backbone(arch, weights="imagenet")
    assert asked["name"].startswith(ARCHITECTURES[arch].timm + ".") and model.weights == asked["name"]
    config = real(asked["name"]).pretrained_cfg
    assert (model.input.mean, model.input.std) == (config["mean"], config["std"])
    assert load_backbone_weights(model, "imagenet").path == asked["name"]
    def no_network(name, pretrained=False, **kw):
        if pretrained: raise OSError("Network is unreachable")
        return real(name, **kw)
    monkeypatch.setattr(checkpoints.timm, "create_model", no_network)
    with pytest.raises(ConnectionError, match="could not fetch.*Network is unreachable.*HF_HOME.*weights=path"):
        create_backbone(arch, weights="imagenet")


@pytest.mark.parametrize("arch", ["resnet50_ibn", "vit_small", "repvit_m1_5", "ghostnet_0_5", "resnet10_tiny"])
def test_no_imagenet(arch):
    with pytest.raises(ValueError, match="no ImageNet weights.*" + (
            "standard_vit_small" if arch == "vit_small" else "weights=path")):
        create_backbone(arch, weights="imagenet")


@pytest.mark.parametrize("arch", ["resnet10_tiny_ibn", "vit_tiny", "repvit_m0_9"])
def test_save_and_load(tmp_path, arch):
    model = create_backbone(arch, (128, 64)).eval()
    model.input = InputSpec(128, 64, mean=(.5, .5, .5), std=(.5, .5, .5))
    path = save_backbone(model, tmp_path / "a" / "backbone.safetensors", recipe=dict(stage="pretrain"),
                         licence="Apache-2.0")
    back, x = load_backbone(path), torch.randn(2, 3, 128, 64)
    with torch.inference_mode(): assert torch.equal(back(x), model(x))
    assert back.card["weights"] is None
    assert load_backbone(save_backbone(back, tmp_path / "b.safetensors")).card["weights"] == str(path)
    assert back.input == model.input and back.card["recipe"]["stage"] == "pretrain" and not back.training
    assert sorted(p.name for p in path.parent.iterdir()) == ["backbone.json", "backbone.safetensors"]
    with pytest.raises(ValueError, match="written by save_backbone itself"): save_backbone(model, path, name="x")
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="backbone.json is no card.*lacks name"): load_backbone(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="create_backbone"): load_backbone(path)

"""Checkpoints of other projects: entry names and values as their code writes them."""
import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import wrap
from torch import nn

from cion_nb.models.backbones import create_backbone, load_backbone, save_backbone
from cion_nb.models.checkpoints import load_backbone_weights


# Files of other projects: their names of entries, read off their code; values are random.
def randomised(model, seed=0):
    "Every float entry of a model's own kind and size, so that features depend on all of them."
    generator = torch.Generator().manual_seed(seed)
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            x.copy_((x.abs() + 0.5 if name.endswith("running_var") else x) + 0.02
                    * torch.rand(x.shape, generator=generator))
    return model.eval()


def same(a, b, size=(64, 32), tolerance=1e-5):
    with torch.inference_mode():
        x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
        a, b = a.eval()(x), b.eval()(x)
    return float((a - b).norm(dim=1).max() / torch.pdist(a).mean()) < tolerance


@pytest.mark.slow("builds large networks")
@pytest.mark.parametrize("project", ["lup", "lup-nl"])
def test_lup(project):
    """MoCo as LUP (torchvision's ResNet with a two-layer fc) and LUP-NL (its own encoder with classifier and fc1, fc2)
    save it under DDP.
    """
    good, other, model = randomised(create_backbone("resnet18")), create_backbone("resnet18"), create_backbone(
        "resnet18")
    heads = ({"fc.0.weight": (512, 512), "fc.0.bias": (512,), "fc.2.weight": (128, 512), "fc.2.bias": (128,)}
             if project == "lup" else
             {"classifier.weight": (9, 512), "classifier.bias": (9,), "fc1.weight": (2048, 512), "fc1.bias": (2048,),
              "fc2.weight": (128, 2048), "fc2.bias": (128,)})
    heads = {name: torch.zeros(shape) for name, shape in heads.items()}
    queues = ({"queue": torch.zeros(128, 16), "queue_ptr": torch.zeros(1)}
              | ({} if project == "lup" else {"queue_id": torch.zeros(16, 1), "prototypes": torch.zeros(9, 128)}))
    encoder = lambda net: net.state_dict() | heads
    state = ({f"module.encoder_k.{k}": v for k, v in encoder(other).items()}
             | {f"module.encoder_q.{k}": v for k, v in encoder(good).items()}
             | {f"module.{k}": v for k, v in queues.items()})
    report = load_backbone_weights(model, {"epoch": 200, "arch": "resnet18", "state_dict": state,
                                           "optimizer": {"state": {}, "param_groups": [{"lr": 0.3}]}})
    assert (report.place, report.prefix, report.share) == (("state_dict",), "module.encoder_q.", 1)
    assert sorted(report.unexpected) == sorted("module.encoder_q." + h for h in heads)
    assert len(report.outside) == len(encoder(other)) + len(queues)
    assert same(model, good)


@pytest.mark.slow("builds large networks")
@pytest.mark.parametrize("arch", ["vit_tiny", "standard_vit_tiny"])
@pytest.mark.parametrize("stage", ["pretrained", "converted", "fine-tuned"])
def test_transreid_ssl(arch, stage):
    """DINO's file, its converted teacher, and the fine-tuned model with BNNeck, JPM branches and camera embeddings;
    with and without the convolutional stem.
    """
    good, model = randomised(create_backbone(arch)), create_backbone(arch)
    if stage == "pretrained":
        file = {"student": wrap(create_backbone(arch), "module.backbone."), "teacher": wrap(good, "backbone."),
                "epoch": 100}
        for net, prefix in (("student", "module."), ("teacher", "")):
            file[net] |= {f"{prefix}head.mlp.0.weight": torch.zeros(4, 4),
                          f"{prefix}head.last_layer.weight_g": torch.ones(4, 1)}
    elif stage == "converted": file = wrap(good, "")
    else:
        file = wrap(good, "base.") | {"base.sie_embed": torch.zeros(6, 1, 192), "b1.0.norm1.weight": torch.ones(192),
                                      "classifier.weight": torch.zeros(9, 192), "bottleneck.bias": torch.zeros(192)}
    with warnings.catch_warnings(record=True) as said: report = load_backbone_weights(model, file)
    assert ["sie_embed" in str(w.message) for w in said] == [True] * (stage == "fine-tuned")
    assert (report.share, report.missing, report.prefix) == (1, [], dict(pretrained="backbone.", converted="").get(
        stage, "base."))
    assert report.unexpected == (["base.sie_embed"] if stage == "fine-tuned" else [])
    assert same(model, good)


def test_overlapping_patches_of_transreid():
    good = create_backbone("standard_vit_tiny").state_dict() | {"pos_embed": torch.randn(1, 211, 192)}
    report = load_backbone_weights(create_backbone("standard_vit_tiny"), good)
    assert report.resized == [("pos_embed", (1, 211, 192), (1, 129, 192))] and report.share == 1


def pass_file(prefix="backbone.", parts=3):
    "PASS's ViT: every token has its own entry, positions too."
    net = randomised(create_backbone("standard_vit_tiny"))
    file, generator = {prefix + k: v for k, v in net.state_dict().items()}, torch.Generator().manual_seed(5)
    token = lambda: 0.1 * torch.randn(1, 1, 192, generator=generator)
    file[prefix + "cls_pos"], file[prefix + "pos_embed"] = token(), 0.1 * torch.randn(1, 128, 192, generator=generator)
    for p in range(1, parts + 1): file[f"{prefix}part_token{p}"], file[f"{prefix}part{p}_pos"] = token(), token()
    return net, file


@pytest.mark.slow("builds large networks")
def test_pass(tmp_path):
    """Against its definition written out: class token, three part tokens and patches, each with its position, through
    the blocks.
    """
    net, state = pass_file()
    model = create_backbone("standard_vit_tiny")
    report = load_backbone_weights(model, {"teacher": state,
                                           "student": {"module." + k: torch.zeros_like(v) for k, v in state.items()}})
    assert (report.names, report.added, report.missing, report.unexpected, report.share) == (
        "pass", ["reg_token"], [], [], 1)
    f, x = {k.removeprefix("backbone."): v for k, v in state.items()}, torch.randn(2, 3, 256, 128)
    with torch.inference_mode():
        tokens = [f["cls_token"] + f["cls_pos"]] + [f[f"part_token{p}"] + f[f"part{p}_pos"] for p in (1, 2, 3)]
        y = torch.cat([*(t.expand(2, -1, -1) for t in tokens),
                       net.patch_embed.proj(x).flatten(2).transpose(1, 2) + f["pos_embed"]], dim=1)
        for block in net.blocks: y = block(y)
        want, plain = net.norm(y)[:, 0], net(x)
        assert torch.allclose(model.eval()(x), want, atol=1e-5) and not torch.allclose(plain, want, atol=1e-2)
        assert model(torch.randn(2, 3, 128, 64)).shape == (2, 192)
        path = save_backbone(model, tmp_path / "pass.safetensors")
        assert torch.allclose(load_backbone(path)(x), want, atol=1e-5)
        assert torch.allclose(copy.deepcopy(model)(x), want, atol=1e-5)
    model.train()(x).sum().backward()
    assert model.reg_token.grad is not None


def solider_file(net, semantic=True):
    "A Swin's entries by SOLIDER's names, merging layers with channels first, as mmsegmentation's unfold has them."
    state, generator = {}, torch.Generator().manual_seed(7)
    for name, x in net.state_dict().items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) - 1}.downsample", name)
        name = re.sub(r"^layers", "stages", name).replace("patch_embed.proj",
                                                          "patch_embed.projection").replace(".attn.", ".attn.w_msa.")
        name = re.sub(r"^norm\.", "norm3.",
                      name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1."))
        if ".downsample." in name:
            channels = torch.arange(x.shape[-1]).reshape(2, 2, -1) # (column, row, C) -> their order of the same inputs
            x = x[..., channels.permute(2, 1, 0).flatten()]
        state[name] = x
    state["stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    for i, width in enumerate((96, 192, 384)):
        state[f"norm{i}.weight"], state[f"norm{i}.bias"] = torch.ones(width), torch.zeros(width)
    for i, width in enumerate((192, 384, 768, 768) if semantic else ()):
        for part in "wb":
            state[f"semantic_embed_{part}.{i}.weight"] = torch.randn(width, 2, generator=generator)
            state[f"semantic_embed_{part}.{i}.bias"] = torch.randn(width, generator=generator)
    return state


@pytest.mark.slow("builds large networks")
@pytest.mark.parametrize("wrapper",
                         [lambda s: {"teacher": {"backbone." + k: v for k, v in s.items()}
                                     | {"head.mlp.0.weight": torch.zeros(4, 4)}},
                          lambda s: {"base." + k: v for k, v in s.items()}
                          | {"classifier.weight": torch.zeros(9, 768)}], ids=["pretrained", "fine-tuned"])
def test_solider(wrapper, tmp_path):
    """Against its definition written out: what a stage hands on is scaled by softplus and shifted, both linear in the
    semantic weight.
    """
    net, model = randomised(create_backbone("swin_tiny", (64, 32))), create_backbone("swin_tiny", (64, 32))
    state, weight = solider_file(net), 0.7
    report = load_backbone_weights(model, wrapper(state), semantic=weight)
    assert (report.names, report.share, report.missing) == ("solider", 1, [])
    assert report.added == [f"layers.{s}.downsample.reduction.bias" for s in (1, 2, 3)]
    assert sorted(n.split(".", 1)[1] for n in report.unexpected if "norm" in n) == sorted(
        f"norm{i}.{p}" for i in range(3) for p in ("weight", "bias"))
    x, at = torch.randn(2, 3, 64, 32), torch.tensor([weight, 1 - weight])
    of = lambda part, i: state[f"semantic_embed_{part}.{i}.weight"] @ at + state[f"semantic_embed_{part}.{i}.bias"]
    with torch.inference_mode():
        y = net.patch_embed(x)
        for i, layer in enumerate(net.layers):
            y = layer.downsample(y)
            if i: y = y * F.softplus(of("w", i - 1)) + of("b", i - 1)
            y = layer.blocks(y)
        want = net.norm(y).mean((1, 2))
        assert torch.allclose(model.eval()(x), want, atol=1e-4) and not torch.allclose(net(x), want, atol=1e-2)
        back = load_backbone(save_backbone(model, tmp_path / "solider.safetensors"))
        assert torch.allclose(back(x), want, atol=1e-4)
        load_backbone_weights(model, wrapper(state))           # another weight changes the features
        assert not torch.allclose(model(x), want, atol=1e-2)


def test_solider_without_semantics_is_swin():
    net, model = randomised(create_backbone("swin_tiny", (64, 32))), create_backbone("swin_tiny", (64, 32))
    report = load_backbone_weights(
        model, {"state_dict": {"module.backbone." + k: v for k, v in solider_file(net, semantic=False).items()}})
    assert report.added == [] and report.share == 1 and same(model, net)


@pytest.mark.slow("builds large networks")
def test_fast_reid():
    "Its baseline, and the MGN that LUP fine-tunes, whose global branch is the rest of the network."
    good, model = randomised(create_backbone("resnet50_ibn", (64, 32))), create_backbone("resnet50_ibn", (64, 32))
    pixels = {"pixel_mean": torch.zeros(1, 3, 1, 1), "pixel_std": torch.ones(1, 3, 1, 1)}
    baseline = {"model": wrap(good, "backbone.") | pixels | {
        "heads.bottleneck.0.weight": torch.ones(2048), "heads.classifier.weight": torch.zeros(9, 2048)}, "iteration": 7}
    report = load_backbone_weights(model, baseline)
    assert (report.place, report.prefix, report.share, report.unexpected, len(report.outside)) == (
        ("model",), "backbone.", 1, [], 4)
    assert same(model, good)
    mgn = dict(pixels)
    for name, x in good.state_dict().items():
        top, rest = name.split(".", 1)
        if top in ("conv1", "bn1", "layer1", "layer2"):
            mgn[f"backbone.{dict(conv1=0, bn1=1, layer1=4, layer2=5)[top]}.{rest}"] = x
        elif name.startswith("layer3.0."): mgn[f"backbone.6.{name[9:]}"] = x
        else:
            branch = f"0.{int(rest.split('.')[0]) - 1}.{rest.split('.', 1)[1]}" if top == "layer3" else f"1.{rest}"
            mgn |= {f"b1.{branch}": x, f"b2.{branch}": torch.zeros_like(x), f"b3.{branch}": torch.zeros_like(x)}
    model = create_backbone("resnet50_ibn", (64, 32))
    report = load_backbone_weights(model,
                                   {"model": mgn | {"b1_head.bottleneck.0.weight": torch.zeros(256, 2048, 1, 1)}})
    assert (report.names, report.share) == ("mgn", 1) and same(model, good)
    assert all(n.startswith(("b2.", "b3.", "b1_head.", "pixel_")) for n in report.unexpected)


@pytest.mark.slow("builds large networks")
@pytest.mark.parametrize("ours, theirs, exact",
                         [("resnet18", "resnet18", False), ("resnet50", "resnet50", False),
                          ("convnext_tiny", "convnext_tiny", True),
                          ("swin_tiny", "swin_t", False), ("standard_vit_base", "vit_b_16", True)])
def test_torchvision(ours, theirs, exact):
    """Every entry but the classifier; equal features where the network is the same (not ResNet's last stride, Swin's
    window).
    """
    torchvision = pytest.importorskip("torchvision")
    donor = torchvision.models.get_model(theirs).eval()
    if exact: randomised(donor)
    model = create_backbone(ours, (224, 224))
    report = load_backbone_weights(model, donor.state_dict())
    heads = {n for n in donor.state_dict() if n.startswith(("fc.", "head.", "heads.", "classifier.2."))}
    assert (report.share, set(report.unexpected)) == (1, heads)
    assert report.names == ("timm" if ours.startswith("resnet") else "torchvision")
    if exact:
        for part in ("heads", "classifier"):
            if hasattr(donor, part): getattr(donor, part)[-1] = nn.Identity()
        assert same(model, donor, (224, 224), 1e-4)


@pytest.mark.slow("builds large networks")
def test_dinov3():
    """Its consolidated teacher holds a ConvNeXt with its last norm twice; its training files put both networks into one
    table. Its ViT is another network.
    """
    good, model, rules = randomised(create_backbone("convnext_tiny", (64, 32))), create_backbone(
        "convnext_tiny", (64, 32)), []
    for old, new in ((r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
                     (r"^(stages\.\d)\.blocks\.", r"\1."),
                     (r"\.conv_dw\.", ".dwconv."), (r"\.mlp\.fc", ".pwconv"), (r"^head\.norm\.", "norm.")):
        rules.append((old, new))
    def theirs(name):
        for old, new in rules: name = re.sub(old, new, name)
        return name
    state = {theirs(k): v for k, v in good.state_dict().items()}
    state |= {"norms.3.weight": state["norm.weight"], "norms.3.bias": state["norm.bias"]}
    heads = {"dino_head.mlp.0.weight": torch.zeros(4, 4), "ibot_head.mlp.0.weight": torch.zeros(4, 4)}
    report = load_backbone_weights(model, {"teacher": {"backbone." + k: v for k, v in state.items()} | heads})
    assert (report.place, report.prefix, report.share, report.unexpected) == (("teacher",), "backbone.", 1, [])
    assert same(model, good)
    model = create_backbone("convnext_tiny", (64, 32))
    both = {f"{net}.backbone.{k}": v if net == "teacher" else torch.zeros_like(v) for net in ("student", "teacher")
            for k, v in state.items()}
    report = load_backbone_weights(model, {"model": both, "iteration": 5})
    assert (report.place, report.prefix) == (("model",), "teacher.backbone.") and same(model, good)
    vit = {k: v for k, v in create_backbone("standard_vit_tiny").state_dict().items() if k != "pos_embed"}
    vit = {"backbone." + k: v for k, v in vit.items()} | {"backbone.storage_tokens": torch.zeros(1, 4, 192),
                                                          "backbone.rope_embed.periods": torch.zeros(16)}
    with pytest.warns(UserWarning, match="missing: pos_embed"), pytest.warns(
            UserWarning, match="storage_tokens.*rope_embed.*tokens or positions"):
        report = load_backbone_weights(create_backbone("standard_vit_tiny"), {"teacher": vit})
    assert report.missing == ["pos_embed"] and "backbone.rope_embed.periods" in report.unexpected

"""Trial members: one a family, of the family's own blocks, small enough to learn at 64x32 in minutes, and apart from
the zoo."""
import pytest
import torch
from checkpoint_files import SMALLEST
from torch import nn

from cion_nb.models.architectures import ARCHITECTURES, count_gflops, FAMILIES, IBN, list_backbones
from cion_nb.models.backbones import create_backbone, load_backbone, save_backbone
from cion_nb.models.checkpoints import load_backbone_weights

TRIALS = [f"{family}_trial" for family in FAMILIES]
OF_FAMILY = {ARCHITECTURES[name].family: name for name in SMALLEST if ARCHITECTURES[name].in_paper}


def test_one_a_family_apart_from_the_zoo():
    zoo, trials = list_backbones(), list_backbones(trial=True)
    assert trials.name.tolist() == TRIALS and trials.family.tolist() == list(FAMILIES)
    assert len(zoo) == 37 and zoo.in_paper.sum() == 32 and not trials.in_paper.any()
    assert not zoo.name.str.endswith("_trial").any() and list(trials.columns) == list(zoo.columns)
    assert zoo.columns.tolist() == ["name", "family", "timm", "embed_dim", "parameters", "gflops", "has_batchnorm",
                                    "in_paper", "batch_per_gpu", "local_crops", "train_hours"]
    assert list_backbones("vit", trial=True).name.tolist() == ["vit_trial"]
    with pytest.raises(ValueError, match="no family"): list_backbones("resnext", trial=True)
    assert set(ARCHITECTURES) == set(zoo.name) | set(trials.name)
    assert trials.parameters.between(150_000, 800_000).all()


@pytest.mark.parametrize("arch", TRIALS)
def test_its_family_s_own_modules(arch):
    "The classes of timm's model file, and ours, are those of the paper's smallest; nothing of another family."
    family = ARCHITECTURES[arch].family
    here, there = modules(arch), modules(OF_FAMILY[family])
    assert here == there - ({"ConvStem", "IBN"} if family == "vit" else set())
    assert {"resnet": "BasicBlock", "resnet_ibn": "IBN", "ghostnet": "GhostBottleneck", "volo": "Outlooker",
            "edgenext": "SplitTransposeBlock", "repvit": "RepViTBlock", "fastvit": "RepMixerBlock", "vit": "Block",
            "convnext": "ConvNeXtBlock", "swin": "SwinTransformerBlock"}[family] in here


def modules(arch):
    with torch.device("meta"): model = create_backbone(arch)
    return {type(m).__name__ for m in model.modules() if type(m).__module__.startswith(("timm.models", "cion_nb"))}


def test_what_a_family_changes_is_changed_in_its_trial_member():
    models = {name: create_backbone(name, (64, 32)) for name in TRIALS}
    ibn = [n for n, m in models["resnet_ibn_trial"].named_modules() if isinstance(m, IBN)]
    assert ibn == ["layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn1"]
    assert not any(isinstance(m, IBN) for m in models["resnet_trial"].modules())
    assert not any((m.weight == 0).all() for m in models["resnet_trial"].modules() if isinstance(m, nn.BatchNorm2d))
    gates = [b.se.fc1.out_channels for s in models["repvit_trial"].stages for b in s.blocks if hasattr(b.se, "fc1")]
    assert gates == [12, 20, 40, 40]                                 # a quarter, as multiples of 4
    assert models["ghostnet_trial"].drop_rate == 0
    swin = models["swin_trial"]
    assert {tuple(b.window_size) for stage in swin.layers for b in stage.blocks} == {(4, 4)}
    assert swin.layers[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(.1)
    assert create_backbone("swin_trial", drop_path=.3).layers[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(.3)
    vit = models["vit_trial"]
    assert (len(vit.blocks), vit.embed_dim, vit.patch_embed.grid_size) == (4, 96, (8, 4)) and vit.reg_token is None


@pytest.mark.parametrize("arch", TRIALS)
def test_the_last_map_is_a_map(arch):
    "4x2 at 64x32 (the patches of ViT and VOLO: 8x4), 2x1 in the smallest local view, as many as the strides say."
    with torch.device("meta"): model = create_backbone(arch, (64, 32)).eval()
    stride = 8 if arch in ("vit_trial", "volo_trial") else 16
    for height, width in ((64, 32), (32, 16), (128, 64)):
        y = model.forward_features(torch.empty(1, 3, height, width, device="meta"))
        shape = tuple(y.shape[1:3] if arch == "swin_trial" else y.shape[2:])
        if y.ndim == 3: assert y.shape[1] == 1 + height // stride * (width // stride)
        else: assert shape == (height // stride, width // stride)
    if arch not in ("vit_trial", "volo_trial"): assert model.feature_info[-1]["reduction"] == stride


@pytest.mark.slow("trains networks")
@pytest.mark.parametrize("arch", TRIALS)
def test_it_learns(arch):
    """Within a few steps Adam fits four classes to 16 images of noise a little better, and every parameter has a
    gradient (RepViT's not at once: its branches begin at zero).
    """
    torch.manual_seed(0)
    model = create_backbone(arch, (64, 32)).train()
    head = nn.Linear(model.embed_dim, 4)
    images, classes, losses = torch.randn(16, 3, 64, 32), torch.arange(16) % 4, []
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 1e-4)
    for _ in range(6):
        loss = nn.functional.cross_entropy(head(model(images)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert losses[-1] < .98 * losses[0]


@pytest.mark.parametrize("arch", TRIALS)
def test_views_and_files(tmp_path, arch):
    "One feature an image at every size it is used at, in a pass that trains; saved and loaded it computes the same."
    model = create_backbone(arch, (64, 32)).train()
    for size in ((64, 32), (32, 16), (32, 32), (128, 64)):
        assert model(torch.randn(2, 3, *size)).shape == (2, model.embed_dim)
    back = load_backbone(save_backbone(model, tmp_path / "a.safetensors"))
    x = torch.randn(2, 3, 64, 32)
    with torch.inference_mode(): assert torch.equal(back(x), model.eval()(x))
    assert (back.name, back.input, back.embed_dim) == (arch, model.input, ARCHITECTURES[arch].embed_dim)
    with torch.device("meta"): whole = create_backbone(arch)
    assert whole(torch.empty(2, 3, 256, 128, device="meta")).shape == (2, model.embed_dim)


@pytest.mark.parametrize("arch", TRIALS)
def test_table_is_true_of_it(arch):
    "The other columns are checked with the zoo's."
    assert ARCHITECTURES[arch].gflops == round(count_gflops(arch), 3)
    assert .03 < count_gflops(arch, (64, 32)) / count_gflops(arch) < .07, "a sixteenth of the pixels"


@pytest.mark.parametrize("arch", TRIALS)
def test_nobody_has_weights_for_it(arch):
    with pytest.raises(ValueError, match=f"no ImageNet weights for {arch}"):
        create_backbone(arch, (64, 32), weights="imagenet")


def test_what_it_cannot_be():
    with pytest.raises(ValueError, match="vit_trial has no convolutional patch stem"):
        create_backbone("vit_trial", overlap=True)
    for arch, size, why in (("vit_trial", (64, 36), "multiples of 8"), ("volo_trial", (60, 32), "multiples of 8"),
                            ("swin_trial", (63, 32), "multiples of 2"), ("convnext_trial", (32, 8), "at least 16"),
                            ("edgenext_trial", (32, 8), "at least 16")):
        with pytest.raises(ValueError, match=f"{arch} cannot take .*{why}"): create_backbone(arch, size)
    for arch in ("ghostnet_trial", "repvit_trial"):
        with pytest.raises(ValueError, match="no drop path"): create_backbone(arch, drop_path=.1)
    with pytest.raises(ValueError, match="close: .*vit_trial"): create_backbone("vit_tria")


def test_registers_of_a_file():
    "PASS's part tokens become registers of the small ViT as of the others."
    donor = create_backbone("vit_trial", (64, 32)).state_dict()
    torch.manual_seed(0)
    tokens = {f"part_token{i}": torch.randn(1, 1, 96) for i in (1, 2, 3)}
    places = {f"part{i}_pos": torch.randn(1, 1, 96) for i in (1, 2, 3)}
    positions = donor.pop("pos_embed")
    file = donor | tokens | places | dict(cls_pos=positions[:, :1], pos_embed=positions[:, 1:])
    model = create_backbone("vit_trial", (64, 32)).eval()
    report = load_backbone_weights(model, file)
    assert (report.names, report.added, report.share) == ("pass", ["reg_token"], 1) and model.num_prefix_tokens == 4
    want = torch.cat([tokens[f"part_token{i}"] + places[f"part{i}_pos"] for i in (1, 2, 3)], 1)
    assert torch.equal(model.reg_token, want)
    with torch.inference_mode():
        for size in ((64, 32), (32, 16)): assert model(torch.zeros(2, 3, *size)).shape == (2, 96)


@pytest.mark.slow("builds large networks")
def test_a_file_of_a_trial_member_is_named():
    file = create_backbone("resnet_trial", (64, 32)).state_dict()
    with pytest.raises(ValueError, match="does not hold a resnet10_tiny, but all of a resnet_trial"):
        load_backbone_weights(create_backbone("resnet10_tiny", (64, 32)), file)

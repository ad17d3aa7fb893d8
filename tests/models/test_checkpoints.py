"""Checkpoints as people have them: prefixes, wrappers, teachers, what is lost or left over, what is refused and by
which words."""
import copy
import re
import warnings

import pytest
import timm
import torch
from checkpoint_files import MODEL, TINY, wrap
from hypothesis import given, settings, strategies as st
from torch import nn

from cion_nb.models.backbones import create_backbone
from cion_nb.models.checkpoints import load_backbone_weights


@pytest.mark.parametrize("prefix",
                         ["", "module.", "base.", "backbone.", "module.backbone.", "module.encoder_q.",
                          "model.student.net."])
@pytest.mark.parametrize("keys, suffix",
                         [((), ".safetensors"), ((), ".pth"), (("state_dict",), ".pth"),
                          (("checkpoint", "model_ema"), ".pth")])
def test_prefix_is_found(tmp_path, prefix, keys, suffix):
    source, model = create_backbone(**TINY), create_backbone(**TINY)
    file = wrap(source, prefix) | {prefix + "classifier.weight": torch.zeros(5, 256)}
    if suffix == ".safetensors":
        from safetensors.torch import save_file
        save_file(file, tmp_path / "w.safetensors")
    else:
        for key in reversed(keys): file = {key: file, "epoch": 3}
        torch.save(file, tmp_path / "w.pth")
    report = load_backbone_weights(model, tmp_path / f"w{suffix}")
    assert (report.prefix, report.place, report.share) == (prefix, keys, 1.0)
    assert report.unexpected == [prefix + "classifier.weight"]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))
    assert model.weights == str(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("first, second",
                         [("teacher", "student"), ("module.encoder_q.", "module.encoder_k."), ("ema", "model")])
@pytest.mark.parametrize("swap", [False, True])
def test_teacher_wins(first, second, swap):
    good, other, model = (create_backbone(**TINY) for _ in range(3))
    if "." in first:
        file = wrap(good, first) | wrap(other, second) if not swap else wrap(other, second) | wrap(good, first)
    else:
        file = {first: wrap(good, "backbone."), second: wrap(other, "backbone.")}
        if swap: file = dict(reversed(file.items()))
    load_backbone_weights(model, file)
    assert torch.equal(model.conv1.weight, good.conv1.weight)
    load_backbone_weights(model, file, part=second.strip(".").split(".")[-1])
    assert torch.equal(model.conv1.weight, other.conv1.weight)


def test_wrong_checkpoint_is_refused_and_changes_nothing():
    file, model = create_backbone("resnet50", (64, 32)).state_dict(), create_backbone("resnet18", (64, 32))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not hold a resnet18.*nothing was loaded") as e:
        load_backbone_weights(model, file)
    assert "mismatched: ('layer1.0.conv1.weight', (64, 64, 1, 1), (64, 64, 3, 3))" in str(e.value)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert model.weights is None
    with pytest.raises(ValueError, match="does not hold a resnet18_ibn"):
        load_backbone_weights(create_backbone("resnet18_ibn"), model.state_dict())
    with pytest.raises(ValueError, match="holds no named tensors"): load_backbone_weights(model, {"epoch": 3})
    with pytest.raises(ValueError, match="under 'student'"):
        load_backbone_weights(model, {"teacher": model.state_dict()}, part="student")


@pytest.mark.parametrize("lost", ["sie_embed", "NL_2.0.g.weight", "layer1.0.se.fc1.weight", "layer3.9.conv1.weight",
                                  "extra_norm.bias", "reg_token"])
@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_what_the_trunk_lost_is_named_and_heads_are_not(lost, prefix, recwarn):
    heads = {prefix + h: torch.ones(3)
             for h in ("classifier.weight", "fc.0.bias", "bottleneck.weight", "head.mlp.0.weight")}
    report = load_backbone_weights(model := create_backbone(**TINY), wrap(model, prefix) | heads)
    assert report.lost == [] and not recwarn.list
    with pytest.warns(UserWarning, match="trunk has 1 entries"):
        report = load_backbone_weights(model, wrap(model, prefix) | heads | {prefix + lost: torch.ones(3)})
    assert report.lost == [prefix + lost]


PARTS = sorted({name.rpartition(".")[0] for name in MODEL.state_dict()})
HEADS = ["fc", "fc1", "linear", "classifier", "id_classifier", "head", "heads", "dino_head", "proj_head", "head_dist",
         "projector", "predictor", "prototypes", "queue", "bottleneck", "bottleneck_1", "bnneck", "feat", "feat_bn",
         "gem", "pool_layer", "b1", "b2", "b1_head", "b21_head", "b3_pool", "pixel_mean"]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_extra_trunk_entries_are_always_named_and_heads_never(data):
    """Random modules inside the trunk, whatever they are called, and heads beside it, whatever is in them; under any
    prefix.
    """
    word = st.from_regex(r"[a-z][a-zA-Z_]{0,8}[a-z]", fullmatch=True)
    leaf = st.sampled_from(["weight", "bias", "running_mean", "0.weight", "g.bias"])
    inside = data.draw(st.lists(st.builds("{}.{}.{}".format, st.sampled_from(PARTS),
                                          st.one_of(word, st.sampled_from(HEADS)), leaf), max_size=6, unique=True))
    beside = data.draw(st.lists(st.builds("{}.{}".format, st.sampled_from(HEADS), leaf), max_size=6, unique=True))
    prefix = data.draw(st.sampled_from(["", "module.", "model.backbone."]))
    inside = [name for name in inside if name not in MODEL.state_dict()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = load_backbone_weights(MODEL,
                                       wrap(MODEL, prefix) | {prefix + name: torch.ones(2) for name in inside + beside})
    assert sorted(report.lost) == sorted(prefix + name for name in inside) and len(said) == bool(inside)
    assert not inside or f"trunk has {len(inside)} entries" in str(said[0].message)


@pytest.mark.slow("builds large networks")
@pytest.mark.parametrize("deep, shallow, blocks",
                         [("resnet101", "resnet50", "layer3.6, layer3.7"),
                          ("resnet101_ibn", "resnet50_ibn", "layer3.6"),
                          ("swin_small", "swin_tiny", "layers.2.blocks.6"),
                          ("convnext_small", "convnext_tiny", "stages.2.blocks.9")])
def test_deeper_networks_are_refused_and_named(deep, shallow, blocks):
    """Every entry of ours is in the file, and still it is another network; both namings. Cutting it on purpose works as
    the error says.
    """
    with torch.device("meta"): names = {k: v.shape for k, v in create_backbone(deep, (64, 32)).state_dict().items()}
    file, model = ({f"module.{k}": torch.zeros(()).expand(s) for k, s in names.items()},
                   create_backbone(shallow, (64, 32)))
    with pytest.raises(ValueError,
                       match=f"deeper than a {shallow}, with {blocks}.*nothing was loaded. It holds all of a {deep}: "
                             f"name that backbone"):
        load_backbone_weights(model, file)
    cut = {k: v for k, v in file.items() if k[7:] in model.state_dict()}
    assert model.weights is None and load_backbone_weights(model, cut).share == 1


def test_a_stage_more_is_refused_and_a_lone_layer_is_not():
    file = wrap(MODEL, "") | {n.replace("layer4", "layer5"): v for n, v in MODEL.state_dict().items()
                              if n.startswith("layer4")}
    with pytest.raises(ValueError, match="with layer5 besides.*list_backbones.. has none as deep"):
        load_backbone_weights(MODEL, file)
    with pytest.warns(UserWarning, match="trunk has 2 entries.*norms"):
        load_backbone_weights(MODEL,
                              wrap(MODEL, "") | {f"layer1.0.bn3.{p}": torch.ones(32) for p in ("weight", "bias")})


def test_what_the_file_holds_is_named_where_it_is_not_asked_for():
    "Shallower than asked for: the error names the architecture that is there in full."
    with pytest.raises(ValueError, match="does not hold a resnet50, but all of a resnet18"):
        load_backbone_weights(create_backbone("resnet50", (64, 32)), create_backbone("resnet18", (64, 32)).state_dict())


@pytest.mark.parametrize("odd", ["transposed", "another kernel", "another width"])
def test_misshapen_convolutions_are_refused(odd):
    change = {"transposed": lambda w: w.transpose(0, 1) if w.shape[0] != w.shape[1] else w[1:],
              "another kernel": lambda w: w[..., :1, :1], "another width": lambda w: w[1:]}[odd]
    file = {k: change(v) if v.ndim == 4 else v for k, v in MODEL.state_dict().items()}
    with pytest.raises(ValueError, match=r"mismatched: \('conv1.weight'"): load_backbone_weights(MODEL, file)


def test_a_prefix_that_holds_a_part_is_refused():
    own = MODEL.state_dict()
    names = list(own)
    some = names[:2 * len(names) // 5]
    file = {("net.a." if n in some else "net.b.") + n: v for n, v in own.items()}
    with pytest.raises(ValueError, match=r"does not hold a resnet10_tiny: below 95% matched.*nothing was loaded"):
        load_backbone_weights(MODEL, file)


@pytest.mark.parametrize("file, prefix", [
    (lambda net: {"state_dict": wrap(net, "model.backbone.") | {"model.head.weight": torch.ones(2)},
                  "pytorch-lightning_version": "2", "hyper_parameters": {"lr": .1},
                  "callbacks": {"ModelCheckpoint{}": {"best": torch.tensor(.5)}}}, "model.backbone."),
    (lambda net: {"state_dict": wrap(net, "module.")}, "module."),
    (lambda net: {"net": wrap(net, "module.module.")}, "module.module.")], ids=["lightning", "DataParallel", "twice"])
def test_wrappers(file, prefix, capsys):
    report = load_backbone_weights(create_backbone(**TINY), file(MODEL))
    assert (report.prefix, report.share) == (prefix, 1) and capsys.readouterr().out == ""


@pytest.mark.parametrize("first, second", [("teacher", "student"), ("ema", "model"), ("model_ema", "model"),
                                           ("state_dict_ema", "state_dict"), ("ema_state_dict", "state_dict"),
                                           ("ema_model", "model"),
                                           ("swa_model", "model"), ("params_ema", "params"), ("EMA", "model")])
def test_what_was_taken_is_said_and_part_takes_the_other(tmp_path, capsys, first, second):
    good, other, model = (create_backbone(**TINY) for _ in range(3))
    torch.save({second: wrap(other, "backbone."), first: wrap(good, "module.backbone.")}, tmp_path / "file.pth")
    load_backbone_weights(model, tmp_path / "file.pth")
    said = capsys.readouterr().out
    assert torch.equal(model.conv1.weight, good.conv1.weight)
    assert said.startswith(f"file.pth: taken from {first}, prefix") and said.count("\n") == 1
    load_backbone_weights(model, tmp_path / "file.pth", part=re.findall("part='(.*?)'", said)[0])
    assert torch.equal(model.conv1.weight, other.conv1.weight) and capsys.readouterr().out == ""


def test_part_names_the_whole_way_where_one_word_will_not_do(capsys):
    good, other, model = (create_backbone(**TINY) for _ in range(3))
    for file in ({"state_dict": wrap(good, "ema.") | wrap(other, "")}, wrap(good, "ema.") | wrap(other, "")):
        load_backbone_weights(model, file)
        part = re.findall("part='(.*?)'", capsys.readouterr().out)[0]
        assert torch.equal(model.conv1.weight, good.conv1.weight)
        assert part == ("state_dict." if "state_dict" in file else ".")
        load_backbone_weights(model, file, part=part)
        assert torch.equal(model.conv1.weight, other.conv1.weight)


def test_mmengine_keeps_the_average_as_state_dict():
    "Its EMAHook swaps the two when it saves, so that `state_dict` is what is to be used."
    average, trained, model = (create_backbone(**TINY) for _ in range(3))
    for mark in (dict(message_hub={}), dict(meta=dict(mmengine_version="0.10"))):
        load_backbone_weights(model, dict(ema_state_dict=wrap(trained, "module.backbone."),
                                          state_dict=wrap(average, "backbone."), **mark))
        assert torch.equal(model.conv1.weight, average.conv1.weight)


def test_a_teacher_that_lacks_an_entry_is_taken_with_a_warning_and_one_that_lacks_many_is_named(capsys):
    teacher, student, model = wrap(create_backbone(**TINY),
                                   ""), wrap(create_backbone(**TINY), ""), create_backbone(**TINY)
    del teacher["layer4.0.bn2.bias"]
    with pytest.warns(UserWarning, match="missing: layer4.0.bn2.bias"):
        load_backbone_weights(model, {"teacher": teacher, "student": student})
    assert torch.equal(model.conv1.weight, teacher["conv1.weight"]) and "taken from teacher" in capsys.readouterr().out
    few = {k: v for k, v in teacher.items() if not k.startswith("layer4")}
    load_backbone_weights(model, {"teacher": few, "student": student})
    assert torch.equal(model.conv1.weight, student["conv1.weight"])
    assert re.search(r"taken from student.*not from teacher.*part='teacher'", capsys.readouterr().out)


def test_ambiguous_tables_are_refused():
    a, b = create_backbone(**TINY), create_backbone(**TINY)
    file = {"net_1": wrap(a, ""), "net_2": wrap(b, "")}
    with pytest.raises(ValueError, match="several networks.*net_1.*net_2.*part="): load_backbone_weights(a, file)
    load_backbone_weights(a, file, part="net_2")
    assert torch.equal(a.conv1.weight, b.conv1.weight)
    with pytest.raises(ValueError) as e:
        load_backbone_weights(
            a, {"net": wrap(a, "x.") | wrap(create_backbone(**TINY), "y.") | wrap(create_backbone(**TINY), "")})
    assert sorted(re.findall("part='(.*?)'", str(e.value))) == ["net.", "x", "y"]
    load_backbone_weights(a, {"net_1": wrap(b, ""), "net_2": wrap(b, "")})


def test_incomplete_checkpoint():
    source, model = create_backbone(**TINY), create_backbone(**TINY)
    file = source.state_dict()
    del file["layer4.0.bn2.bias"]
    with pytest.warns(UserWarning, match="layer4.0.bn2.bias"): report = load_backbone_weights(model, file)
    assert report.missing == ["layer4.0.bn2.bias"]
    few = {k: v for k, v in file.items() if not k.startswith(("layer3", "layer4"))}
    with pytest.raises(ValueError, match="below 95% matched"): load_backbone_weights(model, few)
    with pytest.warns(UserWarning, match="not completely"):
        assert load_backbone_weights(model, few, min_matched=0.3).share < 0.9
    old = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert load_backbone_weights(model, old).share == 1
    old["layer1.0.conv1.weight"] = old["layer1.0.conv1.weight"] * float("nan")
    with pytest.raises(ValueError, match="NaN or infinity.*layer1.0.conv1.weight"): load_backbone_weights(model, old)


@pytest.mark.slow("builds large networks")
@pytest.mark.parametrize("arch, smaller", [("vit_tiny", (128, 64)), ("volo_d1", (128, 64))])
def test_positions_are_resized_as_the_model_itself_does(arch, smaller):
    "A 256x128 model fed small views, and a small model loaded from it, are the same function."
    big, small = create_backbone(arch).eval(), create_backbone(arch, smaller).eval()
    nn.init.normal_(big.pos_embed)
    report = load_backbone_weights(small, big.state_dict())
    assert [r[0] for r in report.resized] == ["pos_embed"] and report.share == 1
    x = torch.randn(2, 3, *smaller)
    with torch.inference_mode(): assert torch.allclose(big(x), small(x), atol=1e-5)


def test_swin_windows_of_7_are_resized():
    donor = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    report = load_backbone_weights(create_backbone("swin_tiny"), donor.state_dict())
    assert report.share == 1 and len(report.resized) == 12
    assert all(r[1] == (169, r[2][1]) and r[2][0] == 225 for r in report.resized)


def test_tables_of_arrays_are_tables(tmp_path):
    trained, model = create_backbone("resnet10_tiny"), create_backbone("resnet10_tiny")
    torch.save({k: v.numpy() for k, v in trained.state_dict().items()}, tmp_path / "a.pth")
    assert load_backbone_weights(model, tmp_path / "a.pth").share == 1
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in trained.state_dict().items())

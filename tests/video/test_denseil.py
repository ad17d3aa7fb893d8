"""DenseIL against PyTorch's own layers and plain versions: stripes, positions, memories, what moves what."""
import numpy as np
import pytest
import timm
import torch
from torch import nn

from cion_nb.models.architectures import ARCHITECTURES, count_gflops
from cion_nb.models.backbones import create_backbone
from cion_nb.training.finetune import BNNeck
from cion_nb.video.denseil import Block, default_taps, DenseIL, MEMORIES, ppool, StepEmbedding, tap, VARIANTS

D, HEADS, T, P = 32, 4, 3, 2


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_backbone("resnet10_tiny_ibn", (64, 32)).eval()


def made(encoder, seed=0, **changes):
    torch.manual_seed(seed)
    return DenseIL(encoder, **dict(T=T, P=P, d=D, heads=HEADS, blocks=2) | changes).eval()


def clips(n=2, seed=1):
    return torch.randn(n, T, 3, 64, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 3), (6, 5), (1, 1)])
@pytest.mark.parametrize("stripes", [1, 2, 3, 4, 6, 8])
def test_stripes_partition_a_map(shape, stripes):
    x = torch.randn(2, 5, 7, *shape)
    if shape[0] % stripes:
        said = f"P={stripes} stripes do not divide a map {shape[0]} high"
        with pytest.raises(ValueError, match=said): ppool(x, stripes)
        return
    for bad in (0, float(stripes), True):
        said = f"P must be a whole number of stripes, 1 or more, got {bad}"
        with pytest.raises(ValueError, match=said): ppool(x, bad)
    found, rows = ppool(x, stripes), shape[0] // stripes
    for p in range(stripes):
        torch.testing.assert_close(found[:, :, p], x[..., p * rows:(p + 1) * rows, :].mean((-2, -1)))
    torch.testing.assert_close(found.mean(-2), x.mean((-2, -1)))


def plain_attention(layer, q, kv, bias):
    "nn.MultiheadAttention, head by head and query by query."
    (wq, wk, wv), (bq, bk, bv) = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    out, width = torch.empty_like(q), q.shape[-1] // layer.num_heads
    for n in range(len(q)):
        for h in range(layer.num_heads):
            part = slice(h * width, (h + 1) * width)
            query, key, value = (x[n] @ w[part].T + b[part] for x, w, b in ((q, wq, bq), (kv, wk, bk), (kv, wv, bv)))
            logits = query @ key.T / width**.5
            if bias is not None: logits = logits + bias[h]
            out[n, :, part] = logits.softmax(-1) @ value
    return out @ layer.out_proj.weight.T + layer.out_proj.bias


def plain(model, levels):
    "The decoder, written from the formulas."
    flat, step = [level.flatten(1, 2) for level in levels], model.step
    bias = None
    if step.kind == "relative":
        bias = torch.empty(HEADS, T * P, T * P)
        for h in range(HEADS):
            for i in range(T * P):
                for j in range(T * P):
                    t, p = i // P - j // P, i % P - j % P
                    bias[h, i, j] = step.frame[h, t + T - 1] + step.stripe[h, p + P - 1]
    z = flat[-1]
    for b, block in enumerate(model.blocks):
        x = block.norm1(z)
        z = z + plain_attention(block.attention, x, x, bias)
        if model.variant != "self":
            if model.variant == "cross": memory, times = flat[-1], 1
            elif model.kind == "all": memory, times = torch.cat(flat, 1), len(flat)
            elif model.kind == "channel": memory, times = torch.cat(flat, -1) @ model.join.weight.T + model.join.bias, 1
            else: memory, times = torch.cat([z, flat[[0, 3][b]]], 1), 2
            over = None if bias is None else torch.cat([bias] * times, -1)
            z = z + plain_attention(block.memory, block.norm2(z), memory, over)
        z = z + block.feedforward(block.norm3(z))
    return model.norm(z).mean(1)


@pytest.mark.parametrize("step", [None, "absolute", "relative"])
@pytest.mark.parametrize("variant, memory", [("self", "all"), ("cross", "all"), *(("dense", m) for m in MEMORIES)])
@torch.no_grad()
def test_the_decoder_is_its_formulas(encoder, variant, memory, step):
    model = made(encoder, variant=variant, memory=memory, step=step)
    for table in model.step.parameters(): table.normal_()
    levels = model.levels(clips())
    torch.testing.assert_close(model(clips()), plain(model, levels), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_are_projected_stripes_with_their_place(encoder):
    model, x = made(encoder), clips()
    for number, level in enumerate(model.levels(x)):
        for n in range(2):
            for t in range(T):
                m = tap(encoder, x[n, t][None], model.taps)[number]
                for p in range(P):
                    rows = m.shape[-2] // P
                    stripe = m[0, :, p * rows:(p + 1) * rows].mean((-2, -1))
                    wanted = model.project[number](stripe) + model.step.frame[t, 0] + model.step.stripe[p]
                    torch.testing.assert_close(level[n, t, p], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_blocks", [1, 3])
@torch.no_grad()
def test_variants_are_transformer_layers_in_a_row(encoder, n_blocks):
    "`self` is PyTorch's encoder, `cross` its decoder over the top level (the supplement states both)."
    settings = dict(d_model=D, nhead=HEADS, dim_feedforward=4 * D, dropout=0., activation="gelu", batch_first=True,
                    norm_first=True)
    names = dict(attention="self_attn", norm1="norm1") | {"feedforward.0": "linear1", "feedforward.2": "linear2"}
    reads = dict(norm2="norm2", norm3="norm3", memory="multihead_attn")
    for variant, layer, more in (("self", nn.TransformerEncoderLayer, dict(norm3="norm2")),
                                 ("cross", nn.TransformerDecoderLayer, reads)):
        model = made(encoder, variant=variant, blocks=n_blocks)
        top = model.levels(clips())[-1].flatten(1, 2)
        z = top
        for block in model.blocks:
            theirs = layer(**settings).eval()
            for mine, other in (names | more).items():
                theirs.get_submodule(other).load_state_dict(block.get_submodule(mine).state_dict())
            z = theirs(z) if variant == "self" else theirs(z, top)
        torch.testing.assert_close(model(clips()), model.norm(z).mean(1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_top_level_alone_is_cross_and_a_silent_memory_is_self(encoder):
    dense, cross = made(encoder, taps=[4]), made(encoder, variant="cross", taps=[4])
    cross.load_state_dict(dense.state_dict())
    assert torch.equal(dense(clips()), cross(clips()))
    dense, alone = made(encoder), made(encoder, variant="self")
    alone.load_state_dict(dense.state_dict(), strict=False)
    for block in dense.blocks:
        block.memory.out_proj.weight.zero_()
        block.memory.out_proj.bias.zero_()
    torch.testing.assert_close(dense(clips()), alone(clips()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant, memory", [("self", "all"), ("cross", "all"), *(("dense", m) for m in MEMORIES)])
@torch.no_grad()
def test_only_dense_attention_sees_a_low_level(encoder, variant, memory):
    model = made(encoder, variant=variant, memory=memory)
    levels = model.levels(clips())
    noisy = [levels[0] + torch.randn_like(levels[0]), *levels[1:]]
    same = torch.equal(model.decode(levels), model.decode(noisy))
    assert same == (variant != "dense")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_order_is_seen_by_step_embeddings_alone(encoder, variant):
    order, x = torch.tensor([2, 0, 1]), clips()
    def change(kind):
        model = made(encoder, variant=variant, step=kind)
        for table in model.step.parameters(): table.normal_()
        return float((model(x) - model(x[:, order])).abs().max())
    assert change(None) < 1e-5 and change("absolute") > 1e-3 and change("relative") > 1e-3
    model = made(encoder, variant=variant, step=None)
    levels = model.levels(x)
    swapped = [level[:, :, [1, 0]] for level in levels]
    torch.testing.assert_close(model.decode(levels), model.decode(swapped), atol=1e-5, rtol=1e-5)


def test_the_encoder_is_frozen_whatever_the_model_is_told(encoder):
    model = made(encoder).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1)
    for _ in range(2):
        assert not any(m.training for m in encoder.modules()) and model.blocks[0].training
        model(clips()).square().sum().backward()
        optimizer.step()
    assert all(p.grad is None for p in encoder.parameters())
    for name, value in encoder.state_dict().items(): assert torch.equal(value, before[name]), name
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.project.parameters())


@pytest.mark.parametrize("variant, memory, blocks", [("self", "all", 4), ("cross", "all", 3), ("dense", "all", 3),
                                                     ("dense", "mixed", 3)])
def test_variants_of_equal_size(encoder, variant, memory, blocks):
    count = sum(p.numel() for p in made(encoder, variant=variant, memory=memory, blocks=blocks).blocks.parameters())
    wanted = blocks * (12 * D**2 + 13 * D if variant == "self" else 16 * D**2 + 19 * D)
    assert count == wanted and abs(count / (3 * (16 * D**2 + 19 * D)) - 1) < .02


@pytest.mark.slow("builds ten networks")
@pytest.mark.parametrize("name", ["ghostnet_0_5", "edgenext_x_small", "repvit_m0_9", "fastvit_s12", "resnet18",
                                  "resnet18_ibn", "convnext_tiny", "volo_d1", "vit_tiny", "swin_tiny"])
def test_every_family_has_levels(name):
    assert ARCHITECTURES[name].family
    encoder = create_backbone(name, (128, 64)).eval()
    model = DenseIL(encoder, T=2, P=2, d=16, heads=2, blocks=1).eval()
    assert len(default_taps(encoder)) == len(set(model.taps)) == 4
    x = torch.randn(1, 2, 3, 128, 64)
    with torch.no_grad(): assert model(x).shape == (1, 16)
    maps = tap(encoder, x[0], model.taps)
    assert all(a.shape[-2] >= b.shape[-2] for a, b in zip(maps, maps[1:]))


@pytest.mark.parametrize("changes, said", [
    (dict(variant="sparse"), "variant='sparse': choose one of dense"), (dict(memory="none"), "memory='none'"),
    (dict(step="learned"), "kind='learned'"), (dict(d=30), "d=30 .width=. is no multiple of heads=4"),
    (dict(P=3), "P=3 stripes do not divide level 1 of resnet10_tiny_ibn, which is 16 high for 64x32"),
    (dict(P=0), "P must be a whole number of stripes .stripes=., 1 or more, got 0"),
    (dict(P=2.), "P must be .*got 2.0"),
    (dict(T=0), "T must be .* of frames .frames=.*got 0"), (dict(d=0), "d must be .*width.*got 0"),
    (dict(heads=0), "heads must be .*got 0"), (dict(blocks=0), "blocks must be .*got 0"),
    *((dict(taps=taps), "taps=.*: name levels of resnet10_tiny_ibn .*of 0 to 4, in a list")
      for taps in (2, [], [9], [-1, 2], [2, 1], [1, 1], [1.5], [True], "12"))])
def test_what_cannot_be_built_is_refused(encoder, changes, said):
    with pytest.raises(ValueError, match=said): made(encoder, **changes)


@pytest.mark.parametrize("network, said", [
    (nn.Linear(3, 3), "Linear without name, input, forward_intermediates, feature_info: a network of create_backbone"),
    (timm.create_model("resnet18"), "ResNet without name, input:"), ("resnet18", "a str without name")])
def test_a_network_whose_levels_nobody_knows_is_refused(network, said):
    for taps in (None, [1]):
        with pytest.raises(TypeError, match=said): DenseIL(network, taps=taps)
    if not hasattr(network, "forward_intermediates"):
        with pytest.raises(TypeError, match=said): tap(network, torch.zeros(1, 3, 8, 8), [0])


def test_what_wraps_a_network_is_told_from_it(encoder):
    with pytest.raises(TypeError, match="BNNeck without .*; give its .backbone"): DenseIL(BNNeck(encoder, 2))
    assert made(BNNeck(encoder, 2).backbone)(clips()).shape == (2, D)


def test_the_parts_refuse_what_the_whole_does():
    with pytest.raises(ValueError, match="T must be"): StepEmbedding(0, P, D)
    with pytest.raises(ValueError, match="d=30 .width=. is no multiple of heads=4"): Block(30, 4, reads=True)
    with pytest.raises(ValueError, match="heads must be .*got 0"): Block(D, 0, reads=True)
    with pytest.raises(ValueError, match="levels must be .*got 0"):
        default_taps(create_backbone("resnet10_tiny", (64, 32)), 0)


def test_clips_of_another_length_are_refused_with_both_numbers(encoder):
    with pytest.raises(ValueError, match="clips of 5 frames, and the model was made for T=3"):
        made(encoder)(torch.zeros(1, 5, 3, 64, 32))
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 32\) is images, and this model takes clips"):
        made(encoder)(torch.zeros(2, 3, 64, 32))


def test_relative_biases_are_one_a_difference():
    step = StepEmbedding(T, P, D, "relative", HEADS)
    assert sum(p.numel() for p in step.parameters()) == HEADS * (2 * T - 1 + 2 * P - 1)
    assert np.prod(StepEmbedding(T, P, D).frame.shape) == T * D and StepEmbedding(T, P, D, None).bias() is None


def test_a_block_without_memory_has_none():
    assert not hasattr(Block(D, HEADS, reads=False), "memory")


def test_the_decoder_costs_little_beside_its_encoder():
    "At 8 x 256 x 128 over ResNet-50, in multiply-adds; the spec derives some 2 %."
    alone = create_backbone("resnet50", (256, 128))
    model = DenseIL(alone, "dense", "all", T=8, P=4, d=512, blocks=3, heads=8)
    share = count_gflops(model) / (8 * count_gflops("resnet50")) - 1
    assert count_gflops(alone) == count_gflops("resnet50")
    assert .01 < share < .03


@pytest.mark.parametrize("variant, memory, resting", [
    ("dense", "all", []), ("dense", "channel", []), ("dense", "mixed", [1]), ("cross", "all", [0, 1, 2]),
    ("self", "all", [0, 1, 2])])
def test_whatever_learns_has_a_gradient(encoder, variant, memory, resting):
    "A parameter without one stops a training of several processes."
    model = made(encoder, variant=variant, memory=memory, blocks=3).train()
    model(clips()).square().sum().backward()
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {name for name, p in model.named_parameters() if p.grad is not None}
    assert [level for level, part in enumerate(model.project) if not part[0].weight.requires_grad] == resting
    assert model.read_levels == {0, 1, 2, 3} - set(resting)

"""Small networks, and checkpoints with made-up values under the entry names that released files have."""
import copy
import zlib

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cion_nb.models.architectures import ARCHITECTURES
from cion_nb.models.backbones import create_backbone

PAPER = [a.name for a in ARCHITECTURES.values() if a.in_paper]
SMALLEST = ["ghostnet_0_5", "edgenext_x_small", "repvit_m0_9", "fastvit_s12", "resnet18", "resnet18_ibn",
            "convnext_tiny", "volo_d1", "vit_tiny", "swin_tiny", "resnet10_tiny", "resnet10_tiny_ibn"]
TINY = dict(name="resnet10_tiny", image_size=(64, 32))


def synthetic(name, shape, gain):
    "One entry's values, from its name and shape alone."
    x = drawn(np.random.default_rng(zlib.crc32(name.encode())), shape)
    if name.endswith("running_var"): return 1 + 0.1 * np.abs(x)
    if name.endswith("running_mean"): return 0.1 * x
    if len(shape) >= 2 and max(shape[1:]) > 1 or len(shape) == 2:
        return np.multiply(x, np.float32(gain / np.sqrt(np.prod(shape[1:]))), out=x)
    if name.endswith("weight") or "gamma" in name or "layer_scale" in name: return 1 + 0.1 * x
    return 0.02 * x


def drawn(rng, shape):
    "`rng.standard_normal(shape).astype(np.float32)`, in parts: half of its time was memory for the doubles."
    x = np.empty(shape, np.float32)
    flat, part = x.reshape(-1), np.empty(1 << 15)
    for at in range(0, flat.size, part.size):
        here = part[:flat.size - at]
        rng.standard_normal(out=here)
        flat[at:at + part.size] = here
    return x


class Unfilled(TorchDispatchMode):
    "Networks are built with whatever stands in memory as parameters: for those that load every entry afterwards."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.nn.Parameter) and func._schema.is_mutable: return args[0]
        return func(*args, **(kwargs or {}))


def released_file(zoo, arch):
    "A pre-training checkpoint as the released code writes it, both networks with their heads."
    entries, _, gains = zoo
    of = entries[entries.arch == arch]
    net = {}
    for name, shape, dtype in zip(of.name, of["shape"], of.dtype):
        shape = tuple(map(int, shape.split("x"))) if shape else ()
        net[name] = torch.from_numpy(np.asarray(synthetic(name, shape, gains[arch]))) if dtype.startswith(
            "float") else torch.zeros(shape, dtype=torch.int64)
    prefix = "module.backbone." if ARCHITECTURES[arch].has_batchnorm else "backbone."
    head = {prefix.replace("backbone", "head") + "mlp.0.weight": torch.zeros(4, 4)}
    return {"student": {"module.backbone." + k: v.new_zeros(()).expand(v.shape) for k, v in net.items()} | head,
            "teacher": {prefix + k: v for k, v in net.items()} | head, "epoch": 100}, prefix


def wrap(net, prefix): return {prefix + k: v for k, v in net.state_dict().items()}


MODEL = create_backbone(**TINY)


def rounding(model, size):
    """What float32 costs the model itself, in distances between images; the worst of some images, as it varies
    thirtyfold in RepViT.
    """
    x, model = torch.randn(32 if size[0] < 128 else 8, 3, *size,
                           generator=torch.Generator().manual_seed(2)), copy.deepcopy(model).eval()
    with torch.inference_mode():
        y = model(x)
        return float((model.double()(x.double()) - y).norm(dim=1).max() / torch.pdist(y).mean())

"""TransReID: the jigsaw, overlapping patches, cameras."""
import pytest
import torch
from trainings import quick

from cion_nb.core.samples import read_samples, write_samples
from cion_nb.models.backbones import create_backbone, load_backbone, save_backbone
from cion_nb.models.features import embed
from cion_nb.training.finetune import finetune
from cion_nb.training.transreid import jigsaw_groups, TransReID


def test_a_backbone_with_overlapping_patches_comes_back(tmp_path):
    model = create_backbone("vit_tiny", (256, 128), overlap=True)
    assert tuple(model.patch_embed.grid_size) == (21, 10) and model.pos_embed.shape[1] == 211
    with torch.no_grad():
        patches = model.patch_embed(torch.rand(1, 3, 256, 128))
        assert patches.shape[1:3] == (21, 10), "the grid is what the convolution makes"
    save_backbone(model, tmp_path / "b.safetensors")
    back = load_backbone(tmp_path / "b.safetensors")
    x = torch.rand(2, 3, 256, 128)
    with torch.no_grad(): assert torch.equal(back(x), model.eval()(x))
    whole = create_backbone("vit_tiny", (256, 128))
    save_backbone(whole, tmp_path / "w.safetensors")
    # position embeddings are resized
    other = create_backbone("vit_tiny", (256, 128), weights=tmp_path / "w.safetensors", overlap=True)
    assert torch.equal(other.blocks[3].attn.qkv.weight, whole.blocks[3].attn.qkv.weight)
    for name in ("resnet18", "swin_tiny", "standard_vit_tiny"):
        with pytest.raises(ValueError, match="no convolutional patch stem"): create_backbone(name, overlap=True)


def test_jigsaw_keeps_every_patch_once():
    for n, groups, shuffle in ((128, 4, 2), (210, 4, 2), (36, 3, 3), (9, 4, 2)):
        got = torch.cat(jigsaw_groups(torch.arange(n)[None, :, None].float(), groups, 5, shuffle),
                        1).flatten().int().tolist()
        kept = set(got)
        missing = set(range(n)) - kept
        assert len(missing) < groups + shuffle
        assert len(got) == len(jigsaw_groups(torch.zeros(1, n, 1), groups, 5, shuffle)[0][0]) * groups
        assert len(got) - len(kept) <= shuffle, "only repeats of the last patch occur twice"


@pytest.mark.slow("trains networks")
def test_cameras_unknown_to_sie_are_named(people, runs, tmp_path):
    import shutil
    root = shutil.copytree(people.parent, tmp_path / "nowhere")
    t = read_samples(people)
    t.loc[3, "camid"] = -1
    write_samples(t, root / "samples.parquet")
    with pytest.raises(ValueError, match=f"1 have camid -1, the first: {t.path[3]}"):
        finetune(quick(root / "samples.parquet", method="transreid"))
    model = TransReID(create_backbone("vit_tiny", (64, 32)), 5, n_cameras=2).eval()
    with pytest.raises(ValueError, match="also takes camid"): embed(model, [people.parent / t.path[0]])

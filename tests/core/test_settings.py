"""Settings out of range are named; what a profile leaves out may be left out."""
import pytest

from cion_nb.core.settings import recipe


@pytest.mark.parametrize("changes,word",
                         [(dict(ema=[1.5, 2.]), "at most 1"), (dict(moco_momentum=-.1), "not be negative"),
                          (dict(centre_momentum=9.), "at most 1"), (dict(ema=[.9]), "two numbers"),
                          (dict(ema=["a", 1]), "'a' is not a number"),
                          (dict(keep_checkpoints=-1), "be positive"), (dict(keep_checkpoints=0), "be positive"),
                          (dict(lr_per=-1), "be positive"), (dict(clip=-1), "be positive"),
                          (dict(weight_decay=[-1, -1]), "not be negative"), (dict(weight_decay=[.1]), "two numbers"),
                          (dict(warmup_teacher_temp=0), "be positive"), (dict(head_bottleneck=0), "be positive"),
                          (dict(out_dim=1), "at least 2"), (dict(moco_dim=0), "be positive"),
                          (dict(warmup_epochs=-1), "not be negative"),
                          (dict(freeze_last_layer_epochs=-1), "not be negative"),
                          (dict(checkpoint_minutes=float("nan")), "finite"), (dict(seed=1.5), "whole"),
                          (dict(seed=-1), "not be negative"), (dict(seed=2**64), "below 9.22"),
                          (dict(n_local=2.5), "whole"), (dict(n_id=[2.5], n_id_epochs=[0]), "whole"),
                          (dict(n_id=["2"], n_id_epochs=[0]), "not a number"),
                          (dict(workers=-1), "not be negative"), (dict(accumulate=1.5), "whole"),
                          (dict(epochs=None), "a value is needed"),
                          (dict(batch_size=None), "a value is needed"), (dict(image_size=["a", "b"]), "not a number"),
                          (dict(batch_size=48.5), "whole"), (dict(queue=0), "be positive")])
def test_settings_out_of_range_are_named(changes, word):
    with pytest.raises(ValueError, match=f"pretrain setting {next(iter(changes))}=.*{word}"):
        recipe("pretrain", "tiny", **changes)


def test_what_some_profile_leaves_out_may_be_left_out():
    for name in ("images_per_epoch", "clip", "aspect", "global_scale", "data_root", "annotation"):
        assert recipe("pretrain", "tiny", **{name: None})[name] is None
    for name in ("weights", "margin", "keep_list", "drop_path"):
        assert recipe("finetune", "tiny", **{name: None})[name] is None

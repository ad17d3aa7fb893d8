"""Arms and claims: worlds differ in all that they are made of, and the arms of a comparison in one thing."""
import pytest

from cion_nb.companion import arms as A, experiments as E


@pytest.fixture
def chosen(monkeypatch):
    "As if every network's settings were chosen."
    monkeypatch.setattr(A, "settled", lambda *a: {})
    for room in (A, E): monkeypatch.setattr(room, "learned_at", lambda *a: 38_400)
    monkeypatch.setattr(A, "dino_learned_at", lambda *a: 28_800)


def world_of(asked: dict) -> int:
    "The world of an arm's recipe: its seed and that of its data, where it has them."
    if asked["stage"] == "denoise": return world_of(asked["features"])
    found = {asked[name] for name in ("seed",) if name in asked} | {asked["data"]["seed"]}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("arm", A.ARMS)
def test_a_world_is_another_world_in_all_that_an_arm_is_made_of(arm, chosen):
    one, two = (A.ARMS[arm].recipe("small", world) for world in (1, 2))
    text = [repr(made).replace("'seed': 1", "'seed': W").replace("'seed': 2", "'seed': W") for made in (one, two)]
    assert text[0] == text[1] and one != two                             # nothing but seeds differs
    assert world_of(one) == 1
    assert E.run_name(one) != E.run_name(two)


def test_arms_of_a_world_share_data_and_budget():
    images = [arm for arm in A.ARMS.values() if isinstance(arm, A.Arm)]
    usual = [arm for arm in images if arm.method and not arm.then and not arm.backbone and not arm.epochs]
    made = [arm.recipe("small", 3) for arm in usual]
    for name in ("data", "epochs", "images_per_epoch", "batch_size", "backbone", "lr", "seed"):
        assert all(recipe[name] == made[0][name] for recipe in made)


def test_pairs_of_a_claim_differ_in_what_it_is_about():
    "Fine-tunings and adaptations of a pair share all but their start; a tenth of the data all but the share."
    for better, worse in (*A.CLAIMS["few labels"].comparisons, A.CLAIMS["C6"].comparisons[0]):
        one, other = (A.ARMS[name].recipe("small", 1) for name in (better, worse))
        assert {k for k in one if one[k] != other[k]} == {"weights"} and other["weights"] is None
    one, other = (A.ARMS[name].recipe("small", 1) for name in A.CLAIMS["C6"].comparisons[1])
    assert {k for k in one if one[k] != other[k]} == {"weights"} and one["stage"] == "uda"
    starts = one["weights"], other["weights"]                            # both learned from labels of world B
    assert {k for k in starts[0] if starts[0][k] != starts[1][k]} == {"weights"} and starts[1]["weights"] is None
    assert starts[0]["data"]["bank"] == "B" != one["data"]["bank"]
    one, other = (A.ARMS[name].recipe("small", 1) for name in A.CLAIMS["C4"].comparisons[0])
    assert {k for k in one if one[k] != other[k]} == {"data_share"}
    assert [A.ARMS[f"tuned_{few:g}"].recipe("small", 1)["few_ids"] for few in A.FEW] == list(A.FEW)


def test_pairs_of_a_network_of_its_own_differ_in_start_and_chosen_settings(chosen):
    for name in ("budget tuned", "C3"):
        for better, worse in A.CLAIMS[name].comparisons:
            one, other = (A.ARMS[arm].recipe("small", 1) for arm in (better, worse))
            assert {k for k in one if one[k] != other[k]} == {"weights"} and other["weights"] is None
            assert one["image_size"] == one["weights"]["image_size"] == [64, 32]
    for n in A.BUDGETS:
        dino, cion = (A.ARMS[f"{m}_{n}"].recipe("small", 1) for m in ("dino", "cion"))
        assert dino["epochs"] * dino["images_per_epoch"] == cion["epochs"] * cion["images_per_epoch"] == n


def test_the_worlds_of_the_settings_are_none_of_an_experiments():
    "Settings of the profiles were looked for in world 0."
    assert A.ARMS["identity"].recipe("small", 1)["identities"]["features"]["model"]["data"]["bank"] == "B"
    for claim in A.CLAIMS.values():
        assert claim.worlds >= 5 and set(claim.arms) <= set(A.ARMS)
        assert all(better != worse for better, worse in claim.comparisons)


def test_arms_on_clips_differ_in_what_their_claim_is_about():
    "Decoders of a world share encoder, clips, steps; and an encoder never saw a twin, nor anybody of world A."
    trained = [a for a in A.ARMS.values() if isinstance(a, A.ClipArm) and a.method in ("self", "cross", "dense")]
    for arm in trained:
        made = arm.recipe("small", 2)
        one, first = A.ARMS["clip_mark_cross"].recipe("small", 2), made["weights"]
        differ = {name for name in made if made[name] != one[name]}
        assert differ <= {"method", "blocks", "data", "step", "memory", "kept", "weights"}
        assert first["data"]["bank"] == "B" != made["data"]["bank"] and "twins" not in first["data"]["values"]
        assert ("weights" in differ) == bool(arm.start) and made["epochs"] * made["images_per_epoch"] == 600 * 32
    kept = A.ARMS["clip_kept"].recipe("small", 2)
    assert kept["kept"]["features"]["model"] == kept["weights"] and kept["kept"]["features"]["data"] == kept["data"]


def test_decoders_that_are_compared_are_equally_large():
    from cion_nb.video.video_reid import draw_clip_model
    sizes = {}
    for name in ("self", "cross", "dense"):
        made = A.ARMS[f"clip_mark_{name}"].recipe("small", 1)
        model = draw_clip_model(made, 60)
        whole, frozen = (sum(p.numel() for p in part.parameters()) for part in (model, model.backbone.encoder))
        sizes[name] = whole - frozen
    assert sizes["cross"] == sizes["dense"]
    assert sizes["self"] == pytest.approx(sizes["dense"], rel=.1)

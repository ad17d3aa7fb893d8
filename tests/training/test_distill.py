"""Eq. 8-9 against its plain definition, DINO, collapse, alarms."""
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings, strategies as st

from cion_nb.training import distill
from cion_nb.training.distill import (
    ALARMS,
    CollapseWatch,
    feature_rank,
    folded_targets,
    IdentityGuidedLoss,
    InfoNCELoss,
    ProjectionHead,
    teacher_statistics,
    VARIANTS,
)

torch.set_num_threads(1)


def plain_loss(student, teacher, identity, variant, centre, student_temp=.1, teacher_temp=.04):
    "Eq. 9 and the released code's rule, pair by pair: student (V, B, K), teacher (G, B, K)."
    log_p, target = (student / student_temp).log_softmax(-1), ((teacher - centre) / teacher_temp).softmax(-1)
    (V, B, _), G, losses = student.shape, len(teacher), []
    for person in sorted(set(identity.tolist())):
        X = [k for k in range(B) if identity[k] == person]
        n, terms, weights = len(X), [], []
        for i in X:
            for j in X:
                for a in range(G):
                    for b in range(V):
                        if variant == "paper" and (i, a) == (j, b): continue
                        if variant == "released" and a == b: continue
                        terms.append(-(target[a, i] * log_p[b, j]).sum())
                        weights.append(1. if variant == "paper" else (1 / n if i == j else 1.) / (n * (n - 1) + 1))
        if variant == "paper": assert len(terms) == G * n * (n * V - 1)
        scale = len(terms) if variant == "paper" else G * (V - 1)
        losses.append(sum(w * t for w, t in zip(weights, terms)) / scale)
    return sum(losses) / len(losses)


def dino_loss(student, teacher, centre, student_temp=.1, teacher_temp=.04):
    "facebookresearch/dino's loss in its own order: mean over the batch of each view pair, mean over pairs."
    q, total, n = ((teacher - centre) / teacher_temp).softmax(-1), 0., 0
    for a in range(len(q)):
        for b in range(len(student)):
            if a == b: continue
            total, n = total + (-q[a] * (student[b] / student_temp).log_softmax(-1)).sum(-1).mean(), n + 1
    return total / n


def both(variant, counts, n_local, K=5, dtype=torch.float64, seed=0, n_global=2, spread=1.):
    "Value and gradient of ours and of the plain loss, on shuffled images of identities with these counts."
    g = torch.Generator().manual_seed(seed)
    identity = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * 7 + 3
    identity = identity[torch.randperm(len(identity), generator=g)]
    V, B = n_global + n_local, len(identity)
    student = (spread * torch.randn(V, B, K, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    teacher = (spread * torch.randn(n_global, B, K, generator=g, dtype=torch.float64)).to(dtype)
    loss = IdentityGuidedLoss(K, V, n_global, variant=variant).to(dtype)
    loss.centre.copy_(torch.randn(K, generator=g))
    centre = loss.centre.clone()
    value = loss(student.flatten(0, 1), teacher.flatten(0, 1), identity)
    slow = plain_loss(student.double(), teacher.double(), identity, variant, centre.double())
    return value, slow, *(torch.autograd.grad(x, student)[0].double() for x in (value, slow))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", range(1, 9))
def test_equal_counts_equal_the_plain_loss(variant, n):
    for n_local in (0, 1, 10):
        value, slow, grad, slow_grad = both(variant, [n, n], n_local, seed=n)
        assert value.item() == pytest.approx(slow.item(), rel=1e-12)
        assert torch.allclose(grad, slow_grad, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=3), n_local=st.integers(0, 10),
       n_global=st.integers(1, 3), K=st.integers(2, 9), seed=st.integers(0, 99))
def test_uneven_counts_equal_the_plain_loss(counts, n_local, n_global, K, seed):
    if n_global + n_local < 2: n_local = 1
    value, slow, grad, slow_grad = both("paper", counts, n_local, K, seed=seed, n_global=n_global)
    assert value.item() == pytest.approx(slow.item(), rel=1e-12) and torch.allclose(grad, slow_grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_to_1e_6(variant):
    for counts in ([2, 2, 2], [4, 4]):
        value, slow, grad, slow_grad = both(variant, counts, 3, K=64, dtype=torch.float32)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(slow.item(), rel=1e-6)
        assert torch.allclose(grad, slow_grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_image_an_identity_is_dino(variant):
    torch.manual_seed(0)
    V, B, K = 6, 5, 13
    loss, centre = IdentityGuidedLoss(K, V, variant=variant).double(), torch.zeros(K, dtype=torch.float64)
    for _ in range(3):
        student, teacher = torch.randn(V, B, K, dtype=torch.float64,
                                       requires_grad=True), torch.randn(2, B, K, dtype=torch.float64)
        value, theirs = loss(student.flatten(0, 1), teacher.flatten(0, 1),
                             torch.randperm(B)), dino_loss(student, teacher, centre)
        assert value.item() == pytest.approx(theirs.item(), rel=1e-12)
        assert torch.allclose(*(torch.autograd.grad(x, student)[0] for x in (value, theirs)), rtol=0, atol=1e-12)
        centre = .9 * centre + .1 * teacher.flatten(0, 1).mean(0)
        assert torch.allclose(loss.centre, centre, rtol=0, atol=1e-12)


def test_masses_and_the_share_of_own_image_terms():
    "Targets sum to their mass; the masses of all student views sum to 1; shares as the facts state for ten views."
    for n, paper, released in ((2, .474, .333), (4, .231, .077), (6, .153, .032), (8, .114, .018)):
        one_hot, identity = torch.eye(2 * n, dtype=torch.float64).reshape(2, n, 2 * n), torch.zeros(n, dtype=torch.long)
        for variant, share in (("paper", paper), ("released", released)):
            targets, mass = folded_targets(one_hot, identity, 10, variant)
            assert mass.shape == (10, n) and mass.sum().item() == pytest.approx(1.)
            weights = torch.stack([targets[min(v, 2)] for v in range(10)])
            assert torch.allclose(weights.sum(-1), mass)
            own = sum(weights[:, i, [i, n + i]].sum() for i in range(n)).item()
            assert own == pytest.approx(share, abs=6e-4)


def test_order_and_names_of_identities_do_not_matter():
    torch.manual_seed(0)
    V, B, K, identity = 4, 6, 9, torch.tensor([0, 0, 1, 1, 1, 2])
    student, teacher = torch.randn(V, B, K, dtype=torch.float64), torch.randn(2, B, K, dtype=torch.float64)
    value = lambda s, t, i: IdentityGuidedLoss(K, V).double()(s.flatten(0, 1), t.flatten(0, 1), i).item()
    expected, order = value(student, teacher, identity), torch.tensor([4, 0, 5, 2, 1, 3])
    assert value(student[:, order], teacher[:, order], identity[order]) == pytest.approx(expected, rel=1e-12)
    assert value(student, teacher, identity * 1000 + 5) == pytest.approx(expected, rel=1e-12)
    assert value(student + 1e4, teacher, identity) == pytest.approx(expected, rel=1e-9)       # logits have no origin


def test_bf16_logits_accumulate_in_float32():
    torch.manual_seed(0)
    V, B, K, identity = 4, 4, 512, torch.tensor([0, 0, 1, 1])
    student, teacher = torch.randn(V * B, K).bfloat16().requires_grad_(), torch.randn(2 * B, K).bfloat16()
    exact = student.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16): value = IdentityGuidedLoss(K, V)(student, teacher, identity)
    full = IdentityGuidedLoss(K, V)(exact, teacher.float(), identity)
    # the same numbers, the same arithmetic
    assert value.dtype == torch.float32 and value.item() == full.item()
    value.backward()
    full.backward()
    assert student.grad.dtype == torch.bfloat16 and torch.equal(student.grad, exact.grad.bfloat16())


def test_teacher_gets_no_gradient_and_eval_keeps_the_centre():
    student, teacher = torch.randn(8, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss = IdentityGuidedLoss(5, 4)
    loss(student, teacher, torch.tensor([0, 0])).backward()
    assert teacher.grad is None and student.grad is not None and loss.centre.any()
    before = loss.centre.clone()
    loss.eval()(student, teacher, torch.tensor([0, 0]))
    assert torch.equal(loss.centre, before)
    assert set(loss.state_dict()) == {"centre"}


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_step_in_pieces_is_the_step(variant):
    """Loss, gradient and centre of three steps: the pieces see one centre, which moves once, by all outputs. The same
    for MoCo's queue.
    """
    g = torch.Generator().manual_seed(0)
    identity = torch.arange(8) // 2
    found = {}
    for n in (1, 2, 4):
        g.manual_seed(0)
        loss = IdentityGuidedLoss(6, 3, variant=variant, accumulate=n)
        values = []
        for _ in range(3):
            s, t = (torch.randn(v, 8, 6, generator=g, dtype=torch.float64).requires_grad_(v == 3) for v in (3, 2))
            parts = [loss(s[:, i:i + 8 // n].flatten(0, 1), t[:, i:i + 8 // n].flatten(0, 1),
                          identity[i:i + 8 // n] - identity[i]) / n for i in range(0, 8, 8 // n)]
            values += [sum(parts), torch.autograd.grad(sum(parts), s)[0], loss.centre.clone()]
        found[n] = values
    for n in (2, 4):
        for a, b in zip(found[1], found[n]): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="not known before its last part"):
        IdentityGuidedLoss(6, 3, centre="batch", accumulate=2)
    for n in (1, 4):
        torch.manual_seed(1)
        moco = InfoNCELoss(5, 20, accumulate=n)
        g.manual_seed(2)
        values = []
        for _ in range(3):
            q, k = torch.randn(8, 5, generator=g), torch.randn(8, 5, generator=g)
            values += [sum(moco(q[i:i + 8 // n], k[i:i + 8 // n]) for i in range(0, 8, 8 // n)) / n,
                       moco.queue.keys.clone(), moco.queue.at.clone()]
        found[n] = values
    for a, b in zip(found[1], found[4]): torch.testing.assert_close(a, b)


def test_batch_centre_is_the_mean_of_this_batch():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64) + 5
    loss = IdentityGuidedLoss(7, 4, centre="batch").double()
    assert loss(student.flatten(0, 1), teacher.flatten(0, 1), torch.arange(3)).item() == pytest.approx(
        dino_loss(student, teacher, teacher.mean((0, 1))).item())
    assert torch.allclose(loss.centre, teacher.mean((0, 1)))


@pytest.mark.parametrize("make, says", [
    (lambda: IdentityGuidedLoss(8, 4, variant="official"), "variant 'official'"),
    (lambda: IdentityGuidedLoss(8, 4, centre="mean"), "centre 'mean'"),
    (lambda: IdentityGuidedLoss(8, 1), "at least 2 views"),
    (lambda: IdentityGuidedLoss(8, 2, n_global=3), "n_global=3"),
    (lambda: IdentityGuidedLoss(8, 4, student_temp=0.), "temperatures"),
    (lambda: InfoNCELoss(temperature=-1), "temperature"),
    (lambda: ProjectionHead(8, n_layers=0), "n_layers")])
def test_wrong_settings(make, says):
    with pytest.raises(ValueError, match=says): make()


@pytest.mark.parametrize("change, says", [
    (dict(student=torch.randn(11, 8)), r"student logits \(11, 8\)"),
    (dict(teacher=torch.randn(6, 7)), r"teacher logits \(6, 7\)"),
    (dict(identity=torch.tensor([0, -1, 1])), "nobody"), (dict(identity=torch.tensor([0., 1., 1.])), "whole numbers"),
    (dict(identity=torch.zeros(0, dtype=torch.long), student=torch.randn(0, 8), teacher=torch.randn(0, 8)), "none")])
def test_wrong_batches(change, says):
    batch = dict(student=torch.randn(12, 8), teacher=torch.randn(6, 8), identity=torch.tensor([0, 0, 1])) | change
    with pytest.raises(ValueError, match=says):
        IdentityGuidedLoss(8, 4)(batch["student"], batch["teacher"], batch["identity"])
    with pytest.raises(ValueError, match="equally many"):
        IdentityGuidedLoss(8, 4, variant="released")(torch.randn(12, 8), torch.randn(6, 8), torch.tensor([0, 0, 1]))


def test_statistics_tell_collapse():
    K = 32
    ln_K = round(float(torch.tensor(float(K)).log()), 4)
    uniform, one, healthy = torch.full((2, 64, K),
                                       1 / K), torch.eye(K)[:1].expand(2, 64, K), torch.eye(K).repeat(2, 2, 1)
    # entropy, of the mean, KL to uniform, KL to the mean
    numbers = lambda p: [abs(round(float(v), 4)) for v in teacher_statistics(p).values()]
    assert numbers(uniform) == [ln_K, ln_K, 0, 0] and numbers(one) == [0, 0, ln_K, 0]
    assert numbers(healthy) == [0, ln_K, ln_K, ln_K]
    log_p = torch.randn(2, 8, K).log_softmax(-1)
    for a, b in zip(teacher_statistics(log_p.exp()).values(), teacher_statistics(log_p.exp(), log_p).values()):
        assert a.item() == pytest.approx(b.item(), abs=1e-5)
    loss = IdentityGuidedLoss(8, 4)
    loss(torch.randn(16, 8), torch.randn(8, 8), torch.tensor([0, 0, 1, 1]))
    assert set(loss.last) == {"loss", "centre_norm", "centre_share", "teacher_entropy", "marginal_entropy",
                              "kl_to_uniform", "kl_to_mean"}
    assert not any(v.requires_grad for v in loss.last.values())
    assert 0 <= loss.last["teacher_entropy"] <= loss.last["marginal_entropy"] + 1e-6            # entropy is concave


def test_the_centre_becomes_everything_when_outputs_are_constant():
    torch.manual_seed(0)
    loss, z = IdentityGuidedLoss(64, 4), torch.randn(64)
    for _ in range(60): loss(torch.randn(16, 64), z.expand(8, -1), torch.arange(4))
    assert loss.last["centre_share"] > .99
    assert loss.last["centre_norm"].item() == pytest.approx(z.norm().item(), rel=.01)
    for _ in range(60): loss(torch.randn(16, 64), torch.randn(8, 64), torch.arange(4))
    assert loss.last["centre_share"] < .5


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 20), D=st.integers(1, 20), rank=st.integers(1, 5), seed=st.integers(0, 99),
       scale=st.sampled_from([1e-3, 1., 1e3]))
def test_feature_rank_is_that_of_the_spectrum(n, D, rank, seed, scale):
    g = torch.Generator().manual_seed(seed)
    x = scale * (torch.randn(n, rank, generator=g) @ torch.randn(rank, D, generator=g) + torch.randn(D, generator=g))
    spectrum = torch.linalg.svdvals((x - x.mean(0)).double()).square()
    assert feature_rank(x).item() == pytest.approx((spectrum.sum() ** 2 / spectrum.square().sum()).item(), rel=1e-3)
    assert 1 - 1e-3 <= feature_rank(x) <= min(n - 1, D, rank) + 1e-3
    for same in (x[:1].expand(n, -1), x[:1].bfloat16().expand(n, -1), torch.zeros(n, D)): assert feature_rank(same) == 0
    assert feature_rank(x[:1] * (1 + 1e-8 * torch.randn(n, 1, generator=g))) == 0, "rounding is no direction"


@pytest.mark.parametrize("name", ALARMS)
def test_alarms_ring_on_their_side_after_patience_and_never_on_nan(name):
    key, side, threshold, _ = ALARMS[name]
    bad, good = (threshold - .01, threshold + .01) if side == "below" else (threshold + .001, threshold - .01)
    watch = CollapseWatch(after=10, patience=2)
    values = [bad, bad, bad, good, bad, float("nan"), bad, bad, bad, good]                      # seen 5, 10, 15, ...
    rings = [name in watch({"seen": 5 * k + 5, key: v}) for k, v in enumerate(values)]
    assert rings == [False] * 7 + [True, True, False] and watch.rang == {name: 40}
    # a row without the statistics
    assert not CollapseWatch(patience=1)(dict(seen=1, loss=0.))


def test_compiled_functions_are_one_graph_and_give_the_same(monkeypatch):
    "Traced without a break; the kernels themselves are CUDA's. On a CPU nothing is compiled unless asked for."
    made = distill._fused.cache_info().currsize
    monkeypatch.setattr(distill, "_fused", lambda: [torch.compile(f, backend="eager", fullgraph=True)
                                                    for f in (distill._view_loss, distill._view_grad_)])
    torch.manual_seed(0)
    student, teacher, identity, results = torch.randn(12, 50), torch.randn(6, 50), torch.tensor([0, 0, 1]), []
    for fused in (None, True):
        z = student.clone().requires_grad_()
        value = IdentityGuidedLoss(50, 4, fused=fused)(z, teacher, identity)
        value.backward()
        results.append((value.item(), z.grad))
    (a, g), (b, h) = results
    assert a == pytest.approx(b, rel=1e-6) and torch.allclose(g, h, rtol=1e-5, atol=1e-8) and made == 0


@pytest.mark.skipif(not (torch.cuda.is_available() and find_spec("triton")),
                    reason="needs a CUDA device and Triton: the fused path is made for them")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_on_cuda(dtype):
    torch.manual_seed(0)
    student, teacher, identity = (torch.randn(10 * 24, 4096, device="cuda").to(dtype),
                                  torch.randn(2 * 24, 4096, device="cuda"), torch.arange(24, device="cuda") // 4)
    def run(fused):
        z = student.clone().requires_grad_()
        value = IdentityGuidedLoss(4096, 10, fused=fused).cuda()(z, teacher, identity)
        value.backward()
        return value, z.grad.float()
    (a, g), (b, h) = run(False), run(None)
    assert torch.allclose(a, b, rtol=1e-5)
    assert torch.allclose(g, h, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-9)


def test_compiles_without_changing_the_value():
    "The loss and its gradient survive `torch.compile` (the eager backend needs no C compiler)."
    torch.manual_seed(0)
    student, teacher, identity = torch.randn(16, 9, requires_grad=True), torch.randn(8, 9), torch.tensor([0, 0, 1, 1])
    eager = IdentityGuidedLoss(9, 4)
    compiled = torch.compile(deepcopy(eager), backend="eager")
    a, b = eager(student, teacher, identity), compiled(student, teacher, identity)
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    assert torch.allclose(*(torch.autograd.grad(x, student)[0] for x in (a, b)), atol=1e-7)

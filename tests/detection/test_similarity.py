"""Id-Free's losses against their formula box by box, a kept library, finite differences, and at its queue's size."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from cion_nb.detection.similarity import BoxClassifier, ContrastiveSimilarity, far_sum, SimilarityMemory


def boxes(n, people, dim=8, seed=0, unknown=.2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(people, (n,), generator=g)
    labels[torch.rand(n, generator=g) < unknown] = -1
    return torch.randn(n, dim, generator=g, dtype=dtype), labels


def plain(x, labels, temperature, negatives=()):
    "The formula; None without an anchor."
    x, terms = F.normalize(x, dim=1), []
    for i in range(len(x)):
        P = [j for j in range(len(x)) if j != i and labels[j] == labels[i] >= 0]
        N = [x[j] for j in range(len(x)) if min(labels[i], labels[j]) >= 0 and labels[j] != labels[i]] + list(negatives)
        if not P or not N: continue
        far = sum(math.exp(x[i] @ n / temperature) for n in N)
        terms.append(sum(-math.log(e / (e + far)) for e in (math.exp(x[i] @ x[j] / temperature) for j in P)) / len(P))
    return sum(terms) / len(terms) if terms else None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 14), st.integers(1, 6), st.sampled_from([.05, .1, .5]), st.integers(0, 5))
def test_contrastive_is_the_formula(seed, n, people, temperature, q):
    x, labels = boxes(n, people, seed=seed, dtype=torch.float64)
    negatives = F.normalize(torch.randn(q, 8, dtype=torch.float64), dim=1)
    loss = ContrastiveSimilarity(temperature)(x, labels, negatives if q else None)
    want = plain(x, labels.tolist(), temperature, list(negatives))
    assert loss.item() == pytest.approx(want or 0, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("temperature", [.05, .1, .5])
def test_it_is_nt_xent_where_everybody_has_one_other_view(temperature):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = torch.randn(24, 16), torch.arange(24) % 12
    ours = ContrastiveSimilarity(temperature)(x, labels)
    torch.testing.assert_close(ours, losses.NTXentLoss(temperature=temperature)(x, labels))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40), st.integers(1, 17))
def test_the_sum_over_far_rows_and_its_gradient(seed, q, block):
    "Whatever the block; rows left out; no row at all."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(q, 6, generator=g, dtype=torch.float64)
    own = torch.randint(-1, q, (5,), generator=g) if q else torch.full((5,), -1)
    y = far_sum(x, rows, .3, own, block)
    s = (x @ rows.T / .3).masked_fill(own[:, None] == torch.arange(q), -torch.inf)
    want = s.logsumexp(1) if q else torch.full((5,), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(y, want)
    has = want.isfinite()
    if has.any():
        got, = torch.autograd.grad(y[has].sum(), x)
        torch.testing.assert_close(got, torch.autograd.grad(want[has].sum(), x)[0])
    else: assert (torch.autograd.grad(torch.logaddexp(y, torch.ones_like(y)).sum(), x)[0] == 0).all()


def test_gradients_by_finite_differences():
    x, labels = boxes(7, 3, dim=4, seed=3, unknown=.1, dtype=torch.float64)
    negatives = F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1)

    def loss(x):
        u = F.normalize(x, dim=1)
        return far_sum(u, negatives, .2, block=2).sum()

    assert torch.autograd.gradcheck(loss, x.requires_grad_())
    small = ContrastiveSimilarity(.5)
    value = x.detach().float().requires_grad_()
    small(value, labels, negatives.float()).backward()
    for i, j in ((0, 0), (3, 2), (5, 1)):
        step = torch.zeros_like(value)
        step[i, j] = 1e-2
        up, down = (small(value.detach() + sign * step, labels, negatives.float()) for sign in (1, -1))
        assert (up - down).item() / 2e-2 == pytest.approx(value.grad[i, j].item(), abs=2e-3)


def test_alike_boxes_lengths_and_order():
    for n, people in ((6, 3), (20, 10)):
        alike = torch.ones(n, 5)
        assert ContrastiveSimilarity(.1)(alike, torch.arange(n) % people).item() == pytest.approx(
            math.log(1 + n - n // people), abs=1e-5)
    x, labels = boxes(30, 8)
    loss, order = ContrastiveSimilarity(), torch.randperm(30)
    torch.testing.assert_close(loss(x[order] * torch.rand(30, 1).add(.1), labels[order]), loss(x, labels))
    names = torch.tensor([5, 3, 99, 1, 0, 7, 2, 4])
    torch.testing.assert_close(loss(x, torch.where(labels >= 0, names[labels], -1)), loss(x, labels))


def test_boxes_without_a_label_are_in_no_sum():
    x, labels = boxes(20, 5, unknown=.4, seed=1)
    x.requires_grad_()
    ContrastiveSimilarity()(x, labels).backward()
    assert (x.grad[labels < 0] == 0).all() and (x.grad[labels >= 0] != 0).any()
    known = labels >= 0
    torch.testing.assert_close(ContrastiveSimilarity()(x[known], labels[known]), ContrastiveSimilarity()(x, labels))


def test_nothing_overflows_at_a_small_temperature():
    x = F.normalize(torch.randn(6, 4), dim=1).requires_grad_()
    loss = ContrastiveSimilarity(1e-3)(x, torch.arange(6) % 3, F.normalize(torch.randn(50, 4), dim=1))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.slow("a queue of fifty thousand rows")
def test_at_the_size_of_the_supplement():
    "2,000 boxes against 50,000 rows: the sum and its gradient are those of the whole matrix, in a part of its memory."
    x = F.normalize(torch.randn(2_000, 32), dim=1).requires_grad_()
    rows = F.normalize(torch.randn(50_000, 32), dim=1)
    y = far_sum(x, rows, .1)
    got, = torch.autograd.grad(y.sum(), x)
    for at in (0, 1_990):
        part = x[at:at + 10].detach().double().requires_grad_()
        want = (part @ rows.double().T / .1).logsumexp(1)
        torch.testing.assert_close(y[at:at + 10].double(), want, atol=1e-4, rtol=1e-5)
        slope, = torch.autograd.grad(want.sum(), part)
        torch.testing.assert_close(got[at:at + 10].double(), slope, atol=1e-4, rtol=1e-4)


def test_the_memory_over_many_batches():
    "Rows and queue against a dict and a list."
    memory, rows, queue = SimilarityMemory(7, dim=8, queue=11), {}, []
    for step in range(12):
        x, labels = boxes(10, 7, seed=step, unknown=.3)
        u = F.normalize(x, dim=1)
        before = memory.rows.clone()
        memory.update(x, labels)
        for k in sorted(set(labels.tolist()) - {-1}):
            mean = u[labels == k].mean(0)
            rows[k] = F.normalize(mean if k not in rows else .5 * rows[k] + .5 * mean, dim=0)
        queue = (queue + list(u[labels < 0]))[-11:]
        for k in range(7):
            if k in rows: torch.testing.assert_close(memory.rows[k], rows[k])
            if k not in labels: assert torch.equal(memory.rows[k], before[k])
        assert memory.has_row.nonzero()[:, 0].tolist() == sorted(rows)
        torch.testing.assert_close(memory.waiting.sort(0).values, torch.stack(queue).sort(0).values)
        assert len(memory.waiting) == min(11, len(queue))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 6))
def test_the_memorys_loss_is_the_formula(seed, q):
    memory = SimilarityMemory(5, dim=8, queue=q)
    memory.update(*boxes(9, 4, seed=seed + 1))                            # person 4 has no row
    x, labels = boxes(8, 5, seed=seed)
    u, terms = F.normalize(x, dim=1), []
    for f, k in zip(u, labels.tolist()):
        N = [memory.rows[j] for j in range(5) if j != k and memory.has_row[j]] + list(memory.waiting)
        if k < 0 or not memory.has_row[k] or not N: continue
        near = math.exp(f @ memory.rows[k] / .1)
        terms.append(-math.log(near / (near + sum(math.exp(f @ n / .1) for n in N))))
    x.requires_grad_()
    loss = memory(x, labels)
    assert loss.item() == pytest.approx(sum(terms) / len(terms) if terms else 0, abs=1e-4, rel=1e-5)
    loss.backward()
    assert (x.grad[labels < 0] == 0).all() and not memory.rows.requires_grad and not memory.queue.requires_grad


def test_a_memory_is_kept_with_the_model():
    memory, again = SimilarityMemory(5, dim=8, queue=4), SimilarityMemory(5, dim=8, queue=4)
    memory.update(*boxes(12, 5, unknown=.5))
    again.load_state_dict(memory.state_dict())
    x, labels = boxes(9, 5, seed=4)
    assert torch.equal(again(x, labels), memory(x, labels)) and len(again.waiting) == len(memory.waiting)


def test_the_classifier_is_cross_entropy_of_scaled_directions():
    torch.manual_seed(0)
    classifier = BoxClassifier(6, dim=8)
    x, labels = boxes(10, 6, unknown=.3)
    logits = classifier.classes(math.sqrt(2) * math.log(5) * F.normalize(x, dim=1))[labels >= 0]
    torch.testing.assert_close(classifier(x, labels), F.cross_entropy(logits, labels[labels >= 0]))
    torch.testing.assert_close(classifier(9 * x, labels), classifier(x, labels))

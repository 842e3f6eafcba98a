"""Losses against closed forms in float64 and torch.distributions. Shapes: B windows, T tokens, V vocabulary."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from edgekd.distill import losses
from edgekd.distill.losses import FLOOR, LOSSES, cross_entropy, forward_kl, generalized_jsd, log_probs, reverse_kl


def _logits(seed, *shape, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_and_cross_entropy_agree_with_torch_distributions():
    student, teacher = _logits(0, 4, 7, 11), _logits(1, 4, 7, 11)
    q, p = Categorical(logits=student), Categorical(logits=teacher)
    labels = torch.randint(0, 11, (4, 7))
    s, t = log_probs(student), log_probs(teacher)
    torch.testing.assert_close(forward_kl(s, t), kl_divergence(p, q), rtol=0, atol=1e-12)
    torch.testing.assert_close(reverse_kl(s, t), kl_divergence(q, p), rtol=0, atol=1e-12)
    torch.testing.assert_close(cross_entropy(s, labels), -q.log_prob(labels), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_agrees_with_its_definition(beta):
    student, teacher = _logits(0, 5, 11), _logits(1, 5, 11)
    p, q = teacher.softmax(-1), student.softmax(-1)
    mixture = Categorical(probs=beta * p + (1 - beta) * q)
    expected = beta * kl_divergence(Categorical(probs=p), mixture)
    expected += (1 - beta) * kl_divergence(Categorical(probs=q), mixture)
    torch.testing.assert_close(
        generalized_jsd(log_probs(student), log_probs(teacher), beta), expected, rtol=0, atol=1e-12
    )


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 60))
def test_half_jsd_is_symmetric_and_bounded_and_divergences_are_not_negative(seed, scale):
    a, b = log_probs(_logits(seed, 3, 8, scale=scale)), log_probs(_logits(seed + 1, 3, 8, scale=scale))
    jsd = generalized_jsd(a, b, 0.5)
    torch.testing.assert_close(jsd, generalized_jsd(b, a, 0.5), rtol=0, atol=1e-12)
    assert jsd.max() <= math.log(2) + 1e-12
    for divergence in (jsd, forward_kl(a, b), reverse_kl(a, b)):
        assert divergence.min() >= -1e-12
    assert forward_kl(a, a).abs().max() < 1e-12


def test_jsd_at_and_near_its_ends():
    s, t = log_probs(_logits(0, 5, 11, scale=1.0)), log_probs(_logits(1, 5, 11, scale=1.0))
    torch.testing.assert_close(generalized_jsd(s, t, 0), forward_kl(s, t))
    torch.testing.assert_close(generalized_jsd(s, t, 1), reverse_kl(s, t))
    small = 1e-6
    torch.testing.assert_close(generalized_jsd(s, t, small) / small, forward_kl(s, t), rtol=1e-4, atol=0)
    torch.testing.assert_close(generalized_jsd(s, t, 1 - small) / small, reverse_kl(s, t), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="beta"):
        generalized_jsd(s, t, 1.5)


def test_temperature_keeps_the_size_of_the_gradient():
    """T² · dKL/ds goes to (s - t) / V (both centred) as T grows: eq. 4 of Hinton et al. 2015."""
    student, teacher = _logits(0, 1, 1, 16, scale=1.0), _logits(1, 1, 1, 16, scale=1.0)
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    student.requires_grad_()
    labels, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    total, _ = losses.summed_losses(student, teacher, labels, mask, {"forward_kl": 1.0}, temperature=1e4)
    total.backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 16, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_chunked_sum_and_gradient_equal_plain_autograd(name, temperature, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 40)  # 3 tokens a chunk, the last one short
    student, teacher = _logits(0, 2, 5, 13).requires_grad_(), _logits(1, 2, 5, 13)
    labels = torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.uint8)
    weights = {name: 0.7, **({"cross_entropy": 0.3} if name != "cross_entropy" else {})}

    total, parts = losses.summed_losses(student, teacher, labels, mask, weights, temperature=temperature, jsd_beta=0.3)
    (3 * total).backward()

    plain = student.detach().clone().requires_grad_()
    s, t = (plain / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    p, q = t.exp(), s.exp()
    m = 0.3 * p + 0.7 * q
    nll = torch.nn.functional.cross_entropy(plain.flatten(0, 1), labels.flatten(), reduction="none").view(2, 5)
    by_hand = {
        "cross_entropy": nll,
        "forward_kl": temperature**2 * (p * (t - s)).sum(-1),
        "reverse_kl": temperature**2 * (q * (s - t)).sum(-1),
        "jsd": temperature**2 * (0.3 * p * (t - m.log()) + 0.7 * q * (s - m.log())).sum(-1),
    }
    expected = sum(weight * (by_hand[loss] * mask).sum() for loss, weight in weights.items())
    (3 * expected).backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts, torch.stack([(by_hand[loss] * mask).sum().detach() for loss in weights]))
    torch.testing.assert_close(student.grad, plain.grad, rtol=1e-10, atol=1e-13)
    assert not student.grad[mask == 0].any()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_padded_vocabulary_changes_nothing(name):
    """Rows at -inf in both models: same loss as without them, no gradient to them, nothing that is not a number."""
    student, teacher = _logits(0, 1, 3, 8), _logits(1, 1, 3, 8)
    labels, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)

    def with_padding(logits):
        return torch.cat([logits, torch.full((1, 3, 2), -torch.inf, dtype=logits.dtype)], -1)

    padded = with_padding(student).requires_grad_()
    total, _ = losses.summed_losses(padded, with_padding(teacher), labels, mask, {name: 1.0})
    total.backward()
    bare = student.clone().requires_grad_()
    expected, _ = losses.summed_losses(bare, teacher, labels, mask, {name: 1.0})
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded.grad[..., :8], bare.grad, rtol=1e-12, atol=1e-15)
    assert not padded.grad[..., 8:].any()


def test_a_student_that_denies_what_the_teacher_says_is_infinitely_wrong():
    teacher = torch.zeros(1, 4)
    student = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    assert forward_kl(log_probs(student), log_probs(teacher)).item() > -FLOOR / 10
    assert math.isfinite(reverse_kl(log_probs(student), log_probs(teacher)).item())


def test_bfloat16_logits_are_summed_in_float32():
    student, teacher = _logits(0, 2, 64, 257).bfloat16().requires_grad_(), _logits(1, 2, 64, 257).bfloat16()
    labels, mask = torch.zeros(2, 64, dtype=torch.long), torch.ones(2, 64)
    weights = {"forward_kl": 1.0, "cross_entropy": 1.0}
    total, _ = losses.summed_losses(student, teacher, labels, mask, weights)
    exact, _ = losses.summed_losses(student.detach().double(), teacher.double(), labels, mask, weights)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=0)
    total.backward()
    assert student.grad.dtype == torch.bfloat16


def test_a_divergence_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher"):
        losses.summed_losses(
            torch.zeros(1, 1, 2), None, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), {"jsd": 1.0}
        )


def test_the_spec_names_exactly_these_losses():
    from typing import get_args

    from edgekd.spec import LossName

    assert set(get_args(LossName)) == set(LOSSES)

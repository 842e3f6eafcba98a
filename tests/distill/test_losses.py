"""Losses against closed forms in float64 and torch.distributions. Shapes: B windows, T tokens, V vocabulary."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from edgekd.distill import losses
from edgekd.distill.head import Head, Outputs
from edgekd.distill.losses import (
    FLOOR,
    LOSSES,
    Settings,
    Sparse,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    log_probs,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    summed_losses,
    total_variation,
)
from edgekd.spec import OF_PART


def _logits(seed, *shape, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_and_cross_entropy_agree_with_torch_distributions():
    student, teacher = _logits(0, 28, 11), _logits(1, 28, 11)
    q, p = Categorical(logits=student), Categorical(logits=teacher)
    labels = torch.randint(0, 11, (28,))
    s, t = log_probs(student), log_probs(teacher)
    torch.testing.assert_close(forward_kl(s, t).nats, kl_divergence(p, q), rtol=0, atol=1e-12)
    torch.testing.assert_close(reverse_kl(s, t).nats, kl_divergence(q, p), rtol=0, atol=1e-12)
    torch.testing.assert_close(cross_entropy(s, labels).nats, -q.log_prob(labels), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_agrees_with_its_definition(beta):
    student, teacher = _logits(0, 5, 11), _logits(1, 5, 11)
    p, q = teacher.softmax(-1), student.softmax(-1)
    mixture = Categorical(probs=beta * p + (1 - beta) * q)
    expected = beta * kl_divergence(Categorical(probs=p), mixture)
    expected += (1 - beta) * kl_divergence(Categorical(probs=q), mixture)
    torch.testing.assert_close(
        generalized_jsd(log_probs(student), log_probs(teacher), beta).nats, expected, rtol=0, atol=1e-12
    )


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 60))
def test_half_jsd_is_symmetric_and_bounded_and_divergences_are_not_negative(seed, scale):
    a, b = log_probs(_logits(seed, 3, 8, scale=scale)), log_probs(_logits(seed + 1, 3, 8, scale=scale))
    jsd = generalized_jsd(a, b, 0.5).nats
    torch.testing.assert_close(jsd, generalized_jsd(b, a, 0.5).nats, rtol=0, atol=1e-12)
    assert jsd.max() <= math.log(2) + 1e-12
    for divergence in (jsd, forward_kl(a, b).nats, reverse_kl(a, b).nats):
        assert divergence.min() >= -1e-12
    assert forward_kl(a, a).nats.abs().max() < 1e-12


def test_jsd_at_and_near_its_ends():
    s, t = log_probs(_logits(0, 5, 11, scale=1.0)), log_probs(_logits(1, 5, 11, scale=1.0))
    torch.testing.assert_close(generalized_jsd(s, t, 0).nats, forward_kl(s, t).nats)
    torch.testing.assert_close(generalized_jsd(s, t, 1).nats, reverse_kl(s, t).nats)
    small = 1e-6
    torch.testing.assert_close(generalized_jsd(s, t, small).nats / small, forward_kl(s, t).nats, rtol=1e-4, atol=0)
    torch.testing.assert_close(generalized_jsd(s, t, 1 - small).nats / small, reverse_kl(s, t).nats, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="beta"):
        generalized_jsd(s, t, 1.5)


def _of(student, teacher=None, weights=None, labels=None, mask=None, **settings):
    """``summed_losses`` of logits (B, T, V)."""
    labels = torch.zeros(student.shape[:2], dtype=torch.long) if labels is None else labels
    mask = torch.ones(student.shape[:2]) if mask is None else mask
    told = None if teacher is None else Outputs(teacher)
    return summed_losses(Outputs(student), told, labels, mask, weights, Settings(**settings))


def test_temperature_keeps_the_size_of_the_gradient():
    """T² · dKL/ds goes to (s - t) / V (both centred) as T grows: eq. 4 of Hinton et al. 2015."""
    student, teacher = _logits(0, 1, 1, 16, scale=1.0), _logits(1, 1, 1, 16, scale=1.0)
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    student.requires_grad_()
    total, _ = _of(student, teacher, {"forward_kl": 1.0}, temperature=1e4)
    total.backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 16, rtol=1e-3, atol=1e-6)


def _by_hand(student, teacher, labels, temperature, beta, skew):
    """Every loss (B, T) of logits (B, T, V), by its definition, for autograd."""
    s, t = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    p, q, squared = t.exp(), s.exp(), temperature**2
    m, towards_p, towards_q = beta * p + (1 - beta) * q, skew * p + (1 - skew) * q, (1 - skew) * p + skew * q
    nll = torch.nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none")
    return {
        "cross_entropy": nll.view(labels.shape),
        "forward_kl": squared * (p * (t - s)).sum(-1),
        "reverse_kl": squared * (q * (s - t)).sum(-1),
        "skewed_kl": squared * (p * (t - towards_p.log())).sum(-1),
        "skewed_reverse_kl": squared * (q * (s - towards_q.log())).sum(-1),
        "jsd": squared * (beta * p * (t - m.log()) + (1 - beta) * q * (s - m.log())).sum(-1),
        "total_variation": squared * 0.5 * (p - q).abs().sum(-1),
    }


HEADS = {
    "logits": {},
    "head": {"weight"},
    "bias": {"weight", "bias"},
    "scaled and capped": {"weight", "scale", "cap"},
    "padded": {"weight", "bias", "padding"},
}
LABELS = torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.uint8)


def _student(parts, vocabulary=13):
    """Hidden states, head and what plain torch makes of them: parameters, Outputs, logits (2, 5, V)."""
    if not parts:
        logits = _logits(0, 2, 5, vocabulary).requires_grad_()
        return [logits], Outputs(logits), logits
    rows = vocabulary + 4 * ("padding" in parts)
    hidden, weight = _logits(0, 2, 5, 6, scale=1.0).requires_grad_(), _logits(3, rows, 6, scale=1.0).requires_grad_()
    bias = _logits(4, rows, scale=1.0).requires_grad_() if "bias" in parts else None
    scale, cap = (0.7, 2.0) if "cap" in parts else (1.0, None)
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if cap is None else cap * (logits / cap).tanh()
    outputs = Outputs(hidden, Head(weight, bias, scale, cap), vocabulary)
    return [p for p in (hidden, weight, bias) if p is not None], outputs, logits[..., :vocabulary]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_sum_and_gradient_by_chunks_equal_plain_autograd(name, temperature, head, monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 3)  # the last chunk is short
    weights = {name: 0.7, **({"cross_entropy": 0.3} if name != "cross_entropy" else {})}
    teacher, settings = _logits(1, 2, 5, 13), Settings(temperature, 0.3, 0.2)
    parameters, student, plain = _student(HEADS[head])
    expected_parts = {n: (v * MASK).sum() for n, v in _by_hand(plain, teacher, LABELS, temperature, 0.3, 0.2).items()}
    expected = sum(weight * expected_parts[loss] for loss, weight in weights.items())
    slopes = torch.autograd.grad(3 * expected, parameters)

    total, parts = summed_losses(student, Outputs(teacher), LABELS, MASK, weights, settings)
    (3 * total).backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts, torch.stack([expected_parts[loss].detach() for loss in weights]))
    for parameter, slope in zip(parameters, slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-10, atol=1e-12)
    assert not parameters[0].grad[MASK == 0].any()
    if head == "padded":
        assert not parameters[1].grad[13:].any()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_by_differences(name):
    """Of the sum by way of hidden states and a capped head, in float64, without autograd."""
    teacher = Outputs(_logits(1, 2, 5, 13, scale=1.0))
    parameters = [_logits(0, 2, 5, 6, scale=0.5).requires_grad_(), _logits(3, 13, 6, scale=0.5).requires_grad_()]

    def total(hidden, weight):
        student = Outputs(hidden, Head(weight, cap=4.0))
        return summed_losses(student, teacher, LABELS, MASK, {name: 0.5, "forward_kl": 0.2}, Settings(1.5))[0]

    value = total(*parameters)
    value.backward()
    with pytest.raises(RuntimeError, match="taken before"):
        value.backward()
    step, found = 1e-6, [p.detach().clone() for p in parameters]
    for tensor, parameter in zip(found, parameters, strict=True):
        for place in range(tensor.numel()):
            at, before = tensor.view(-1), tensor.view(-1)[place].item()
            at[place] = before + step
            above = total(*found)
            at[place] = before - step
            slope = (above - total(*found)) / (2 * step)
            at[place] = before
            assert parameter.grad.view(-1)[place].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-7)


def test_a_tied_head_adds_to_its_embedding():
    weight = _logits(3, 13, 6, scale=0.5).requires_grad_()
    hidden = torch.nn.functional.embedding(LABELS, weight)
    total, _ = summed_losses(Outputs(hidden, Head(weight)), None, LABELS, MASK, {"cross_entropy": 1.0})
    total.backward()
    plain = weight.detach().clone().requires_grad_()
    logits = torch.nn.functional.embedding(LABELS, plain) @ plain.T
    _by_hand(logits, logits, LABELS, 1.0, 0.5, 0.1)["cross_entropy"][MASK == 1].sum().backward()
    torch.testing.assert_close(weight.grad, plain.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(OF_PART - {"cross_entropy"}))
def test_a_teacher_that_tells_of_every_id_is_the_teacher(name):
    """In any order, and an id in two parts."""
    parameters, student, _ = _student({"weight"})
    told = _logits(1, 2, 5, 13).log_softmax(-1)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3)).expand(2, 5, 13)
    log_probs, weights = told.gather(-1, order), told.gather(-1, order).exp()
    first = weights[..., :1] / 2
    sparse = Sparse(
        torch.cat([order, order[..., :1]], -1),
        torch.cat([log_probs, log_probs[..., :1]], -1),
        torch.cat([first, weights[..., 1:], first], -1),
    )
    mix = {name: 0.7, "cross_entropy": 0.3}
    expected, _ = summed_losses(student, Outputs(told), LABELS, MASK, mix)
    slopes = torch.autograd.grad(expected, parameters)
    total, _ = summed_losses(student, sparse, LABELS, MASK, mix)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for found, slope in zip(torch.autograd.grad(total, parameters), slopes, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-10, atol=1e-13)


def test_no_token_to_learn_is_zero_and_passes_zeros():
    parameters, student, _ = _student({"weight"})
    total, parts = summed_losses(student, Outputs(_logits(1, 2, 5, 13)), LABELS, 0 * MASK, {"forward_kl": 1.0})
    total.backward()
    assert total == 0 and not parts.any() and not any(p.grad.any() for p in parameters)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_padded_vocabulary_changes_nothing(name):
    """Rows at -inf in both models: same loss as without them, no gradient to them, nothing that is not a number."""
    student, teacher, labels = _logits(0, 1, 3, 8), _logits(1, 1, 3, 8), torch.tensor([[1, 2, 3]])

    def with_padding(logits):
        return torch.cat([logits, torch.full((1, 3, 2), -torch.inf, dtype=logits.dtype)], -1)

    padded = with_padding(student).requires_grad_()
    total, _ = _of(padded, with_padding(teacher), {name: 1.0}, labels)
    total.backward()
    bare = student.clone().requires_grad_()
    expected, _ = _of(bare, teacher, {name: 1.0}, labels)
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded.grad[..., :8], bare.grad, rtol=1e-12, atol=1e-15)
    assert not padded.grad[..., 8:].any()


def test_a_student_that_denies_what_the_teacher_says_is_infinitely_wrong():
    teacher = torch.zeros(1, 4)
    student = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    assert forward_kl(log_probs(student), log_probs(teacher)).nats.item() > -FLOOR / 10
    assert math.isfinite(reverse_kl(log_probs(student), log_probs(teacher)).nats.item())
    # Mixing in a share of the other distribution bounds it, by -log α.
    assert skewed_kl(log_probs(student), log_probs(teacher), 0.1).nats.item() < -math.log(0.1)
    assert skewed_reverse_kl(log_probs(teacher), log_probs(student), 0.1).nats.item() < -math.log(0.1)
    assert total_variation(log_probs(student), log_probs(teacher)).nats.item() == pytest.approx(0.25)


def test_bfloat16_logits_are_summed_in_float32():
    student, teacher = _logits(0, 2, 64, 257).bfloat16().requires_grad_(), _logits(1, 2, 64, 257).bfloat16()
    weights = {"forward_kl": 1.0, "cross_entropy": 1.0}
    total, _ = _of(student, teacher, weights)
    exact, _ = _of(student.detach().double(), teacher.double(), weights)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=0)
    total.backward()
    assert student.grad.dtype == torch.bfloat16


def test_autocast_multiplies_in_bfloat16_and_adds_gradients_in_float32():
    hidden, weight = _logits(0, 2, 64, 32, scale=1.0).float().requires_grad_(), _logits(3, 257, 32, scale=0.3).float()
    weight.requires_grad_()
    labels, mask = torch.zeros(2, 64, dtype=torch.long), torch.ones(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = summed_losses(Outputs(hidden, Head(weight)), None, labels, mask, {"cross_entropy": 1.0})
        expected = torch.nn.functional.linear(hidden, weight).float().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(expected, labels.flatten(), reduction="sum")
    slopes = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for found, slope in zip(torch.autograd.grad(total, (hidden, weight)), slopes, strict=True):
        assert found.dtype == torch.float32 and (found - slope).norm() < 0.01 * slope.norm()


class _Largest(TorchDispatchMode):
    """The largest tensor that any operator gives."""

    elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    hidden, weight = torch.randn(1, 512, 16, requires_grad=True), torch.randn(2000, 16, requires_grad=True)
    teacher = Outputs(torch.randn(1, 512, 16), Head(torch.randn(2000, 16)))
    labels, mask = torch.zeros(1, 512, dtype=torch.long), torch.ones(1, 512)
    with _Largest() as largest:
        total, _ = summed_losses(Outputs(hidden, Head(weight)), teacher, labels, mask, {"forward_kl": 1.0, "jsd": 1.0})
        total.backward()
    assert largest.elements == weight.numel()  # all logits: 512 x 2000


def test_a_divergence_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher"):
        _of(torch.zeros(1, 1, 2), None, {"jsd": 1.0})


def test_the_spec_names_exactly_these_losses():
    from typing import get_args

    from edgekd.spec import LossName

    assert set(get_args(LossName)) == set(LOSSES)

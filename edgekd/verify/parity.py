"""Parity: how far an artifact's logits are from the reference's, and whether that passes the gate.

Shapes: ``N`` windows of ``T`` token ids, ``V`` vocabulary size. Logits are float32 ``(T, V)``; every statistic is
computed in float64, a block of rows at a time, so that memory stays near two windows of logits whatever ``V`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import EdgekdError
from ..proof import METRICS, ChunkedPrefill, Comparison, Metric, Parity, Position, TokenCheck
from ..session import Session
from ..spec import Thresholds

Logits = Callable[[np.ndarray], np.ndarray]
"""Ids ``(T,)`` to logits float32 ``(T, V)``."""

_BLOCK_BYTES = 8 * 2**20
_RESAMPLES = 2000
_GREEDY_PROMPTS = 4
NOISE_WINDOWS = 4
"""The first windows, on which the rounding of a runtime's arithmetic is measured."""
# A gate is a floor that was measured, times a margin. A runtime that is sound was at 0.5 to 1.4 of its arithmetic's
# floor; kernels for one row and for many each round, so that two ways of feeding are up to two floors apart.
_MARGIN = 3.0
_SIGMAS = 3.0
_CHANGE = 0.1  # of the distance to the reference
_EXACT_KL = 1e-9  # nats: what float32 itself leaves (4e-11 was seen), with room


@dataclass(frozen=True)
class _Window:
    """Statistics of one window; ``kl`` is NaN where either side's logits are not usable."""

    kl: np.ndarray  # (T,) nats
    same_top1: np.ndarray  # (T,) bool
    nll_reference: np.ndarray  # (T-1,) nats
    nll_artifact: np.ndarray  # (T-1,) nats
    max_difference: float
    mean_difference: float


def _blocks(rows: int, vocab: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (8 * vocab))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _compare(ids: np.ndarray, reference: np.ndarray, artifact: np.ndarray) -> _Window:
    """Statistics of one window: ids ``(T,)``, logits ``(T, V)`` of both."""
    length, vocab = reference.shape
    kl, same = np.empty(length), np.empty(length, bool)
    nll = np.empty((2, length))
    targets = np.append(ids[1:], 0)  # the last position predicts nothing; its value is dropped below
    largest, total, entries = 0.0, 0.0, 0
    for rows in _blocks(length, vocab):
        at = np.arange(rows.stop - rows.start), targets[rows]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            before, after = reference[rows].astype(np.float64), artifact[rows].astype(np.float64)
            change = before - after
            size = np.abs(change)
            counted = np.isfinite(size)
            if not counted.all():
                size, counted = np.where(counted, size, 0.0), counted | (before == after)
            # log p - log q = change, less what both sums are apart.
            (weights, sums, first), (_, other_sums, other_first) = _exponentials(before), _exponentials(after)
            apart = np.log(other_sums / sums)
            change -= first - other_first
            weighted = np.einsum("tv,tv->t", weights, change)
            if not np.isfinite(weighted).all():  # zero times infinity: of no weight
                weighted = np.where(weights > 0, weights * change, 0.0).sum(-1)
            kl[rows] = weighted / sums + apart
            nll[0, rows], nll[1, rows] = np.log(sums) - before[at], np.log(other_sums) - after[at]
        same[rows] = reference[rows].argmax(-1) == artifact[rows].argmax(-1)
        largest = max(largest, float(size.max(initial=0.0)))
        total, entries = total + float(size.sum()), entries + int(counted.sum())
    kl[~np.isfinite(kl)] = np.nan
    same &= ~np.isnan(kl)
    kl = np.maximum(kl, 0.0)  # rounding may leave -1e-17
    return _Window(kl, same, nll[0, :-1], nll[1, :-1], largest, total / max(1, entries))


def _exponentials(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exponentials of logits ``(T, V)`` less their largest, which is taken off in place; the sums of the exponentials
    ``(T,)``; and the largest ``(T, 1)``."""
    largest = logits.max(-1, keepdims=True)
    logits -= largest
    exponentials = np.exp(logits)
    return exponentials, exponentials.sum(-1), largest


def bootstrap_ci95(values: np.ndarray, weights: np.ndarray) -> list[float] | None:
    """95 % interval of the weighted mean by resampling windows (Efron 1979, percentile method, fixed seed).

    Args:
        values: mean of each window, ``(N,)``.
        weights: positions of each window, ``(N,)``.

    Returns:
        Low and high, or None for fewer than two windows.
    """
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    means = (values[drawn] * weights[drawn]).sum(1) / weights[drawn].sum(1)
    return [float(edge) for edge in np.percentile(means, [2.5, 97.5])]


def _measure_window(candidate: Logits, reference: Logits, ids: np.ndarray, number: int) -> _Window:
    """Statistics of window ``number``; the logits are freed on return."""
    expected, got = np.asarray(reference(ids)), np.asarray(candidate(ids))
    if expected.shape != got.shape:
        raise EdgekdError(
            f"the reference's logits are {expected.shape}, the artifact's {got.shape}.",
            "Compare the artifact with the student it was exported from.",
        )
    if np.isnan(expected).any():
        raise EdgekdError(f"the reference's logits are not numbers (window {number}).", "Train the student again.")
    return _compare(ids, expected, got)


def session_logits(session: Session) -> Logits:
    """An artifact's logits of a whole window, fed at once."""

    def logits(ids: np.ndarray) -> np.ndarray:
        session.reset()
        return session.prefill(ids.tolist(), all_logits=True)

    return logits


def compare(reference: Logits, candidate: Logits, windows: np.ndarray) -> Comparison:
    """How far a model's logits are from another's on held-out windows; the first part of :func:`measure`.

    Args:
        windows: int ``(N, T)``.
    """
    return _summary([_measure_window(candidate, reference, ids, number) for number, ids in enumerate(windows)])


def _first_divergence(session: Session, reference: Logits, prompt: np.ndarray, tokens: int) -> int | None:
    """Index of the first greedy token that differs, or None.

    The reference need not generate: up to the first difference both have read the same tokens, so one pass over what
    the artifact wrote shows what the reference would have written.
    """
    session.reset()
    logits = session.prefill(prompt.tolist())
    written: list[int] = []
    for _ in range(tokens):
        written.append(int(logits.argmax()))
        if len(written) < tokens:
            logits = session.decode(written[-1])
    expected = reference(np.append(prompt, written[:-1]).astype(prompt.dtype))[len(prompt) - 1 :].argmax(-1)
    differs = np.flatnonzero(expected != written)
    return int(differs[0]) if len(differs) else None


def _chunked(session: Session, ids: np.ndarray, size: int) -> np.ndarray:
    """Logits ``(T, V)`` of a window fed ``size`` tokens at a time; 1 goes through ``decode``."""
    logits = np.empty((len(ids), session.vocab_size), np.float32)
    session.reset()
    for start in range(0, len(ids), size):
        part = ids[start : start + size].tolist()
        if size == 1 and start:
            logits[start] = session.decode(part[0])
        else:
            logits[start : start + size] = session.prefill(part, all_logits=True)
    return logits


def _chunked_prefill(
    session: Session, reference: Logits, whole: Logits, ids: np.ndarray, chunk_sizes: Sequence[int]
) -> dict[str, ChunkedPrefill]:
    """Each chunk size, and ``all`` at once, against token by token and against the reference."""
    base, expected = _chunked(session, ids, 1), np.asarray(reference(ids))
    before = _compare(ids, expected, base).kl
    chunks: dict[str, ChunkedPrefill] = {}
    for name, size in [*((str(size), size) for size in chunk_sizes if size != 1), ("all", None)]:
        logits = np.asarray(whole(ids)) if size is None else _chunked(session, ids, size)
        apart, after = _compare(ids, base, logits), _compare(ids, expected, logits).kl
        usable = bool(np.isfinite(apart.kl).all() and np.isfinite(after).all() and np.isfinite(before).all())
        chunks[name] = ChunkedPrefill(
            max_abs_difference=apart.max_difference if usable else None,
            argmax_equal=float((base.argmax(-1) == logits.argmax(-1)).mean()),
            kl_mean=float(apart.kl.mean()) if usable else None,
            kl_to_reference=float(after.mean()) if usable else None,
            kl_to_reference_token_by_token=float(before.mean()) if usable else None,
            kl_to_reference_change_error=float((after - before).std() / np.sqrt(len(ids))) if usable else None,
        )
    return chunks


def _check_input(session: Session, windows: np.ndarray, greedy_tokens: int, chunk_sizes: Sequence[int]) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise EdgekdError(f"parity needs windows (N, T) with T >= 2, got {windows.shape}.", "Give it held-out text.")
    if windows.shape[1] > session.context_length:
        raise EdgekdError(
            f"windows of {windows.shape[1]} tokens exceed the artifact's context of {session.context_length}.",
            "Lower verify.context in the spec.",
        )
    if not 1 <= greedy_tokens < session.context_length:
        raise EdgekdError(
            f"greedy_tokens {greedy_tokens} must lie between 1 and the artifact's context {session.context_length}.",
            "Change verify.greedy_tokens in the spec.",
        )
    if windows.min() < 0 or windows.max() >= session.vocab_size:
        raise EdgekdError(
            f"windows hold id {windows.max()}, the artifact has {session.vocab_size} ids.",
            "Tokenize the held-out text with the artifact's tokenizer.",
        )
    if any(size < 1 for size in chunk_sizes):
        raise EdgekdError(f"chunk sizes must be positive, got {list(chunk_sizes)}.")


def measure(
    session: Session,
    reference: Logits,
    windows: np.ndarray,
    *,
    greedy_tokens: int,
    chunk_sizes: Sequence[int] = (1, 7, 32),
    whole: Logits | None = None,
) -> Parity:
    """Compare an artifact with its reference on held-out windows.

    KL and top-1 are over all ``N*T`` positions, perplexity over the ``N*(T-1)`` that have a next token. Positions
    where the artifact's logits are not numbers (or give a KL without bound) are counted and left out of the means.
    Greedy prompts are the first halves of the first four windows; chunked prefill is measured on the first window.

    Args:
        session: the artifact.
        reference: full-precision logits of one sequence.
        windows: int ``(N, T)``.
        greedy_tokens: tokens to generate when looking for the first that differs.
        chunk_sizes: prefill chunks to compare with token by token.
        whole: ``session_logits``, where some of them are remembered.

    Returns:
        All of parity but the tokens and the judgement. Logit differences are in nats.

    Raises:
        EdgekdError: windows do not fit the artifact, or the vocabularies differ.
    """
    _check_input(session, windows, greedy_tokens, chunk_sizes)
    whole = whole or session_logits(session)
    compared = compare(reference, whole, windows)
    half = max(1, min(windows.shape[1] // 2, session.context_length - greedy_tokens))
    firsts = [_first_divergence(session, reference, ids[:half], greedy_tokens) for ids in windows[:_GREEDY_PROMPTS]]
    return Parity(
        **compared.model_dump(),
        greedy_tokens=greedy_tokens,
        greedy_prompts=len(firsts),
        first_diverging_token=min((first for first in firsts if first is not None), default=None),
        first_diverging_token_by_prompt=firsts,
        chunked_prefill=_chunked_prefill(session, reference, whole, windows[0], chunk_sizes),
    )


def _summary(results: list[_Window]) -> Comparison:
    """Figures over all windows, and each window's own."""
    kl = np.stack([window.kl for window in results])  # (N, T)
    usable = ~np.isnan(kl)
    every = np.ones(len(results))
    same = np.array([window.same_top1.mean() for window in results])
    nll = np.array([window.nll_artifact.mean() for window in results])
    reference = float(np.exp(np.mean([window.nll_reference for window in results])))
    found: dict[str, object] = {
        "windows": kl.shape[0],
        "window_tokens": kl.shape[1],
        "unusable_positions": int((~usable).sum()),
        "perplexity_reference": reference,
        "top1_agreement": float(same.mean()),
        "top1_agreement_ci95": bootstrap_ci95(same, every),
        "logit_max_abs_difference": max(window.max_difference for window in results),
        "logit_mean_abs_difference": float(np.mean([window.mean_difference for window in results])),
    }
    samples = {"top1_agreement": same.tolist()}
    reasons: dict[str, str] = {}
    if usable.any():
        counts = usable.sum(1)
        p50, p99 = np.percentile(kl[usable], [50, 99])
        means = (np.nansum(kl, 1) / np.maximum(counts, 1))[counts > 0]
        worst = np.unravel_index(np.nanargmax(kl), kl.shape)
        found |= {
            "kl_mean": float(kl[usable].mean()),
            "kl_mean_ci95": bootstrap_ci95(means, counts[counts > 0]),
            "kl_p50": float(p50),
            "kl_p99": float(p99),
            "kl_max": float(kl[worst]),
            "kl_max_at": Position(window=int(worst[0]), token=int(worst[1])),
        }
        samples["kl_mean"] = means.tolist()
    else:
        reasons |= dict.fromkeys(("kl_mean", "kl_p50", "kl_p99", "kl_max"), "no position has usable logits")
    perplexity = float(np.exp(nll.mean()))
    if np.isfinite(perplexity):
        edges = bootstrap_ci95(nll, every)
        found |= {
            "perplexity_artifact": perplexity,
            "perplexity_artifact_ci95": edges and [float(np.exp(edge)) for edge in edges],
            "perplexity_ratio": perplexity / reference,
        }
        samples["perplexity_artifact"] = np.exp(nll).tolist()
    else:
        reasons |= dict.fromkeys(("perplexity_artifact", "perplexity_ratio"), "a next token has no likelihood at all")
    return Comparison.model_validate(found | {"samples": samples, "reasons": reasons})


def judge(parity: Parity, tokens: TokenCheck | None, gate: Thresholds) -> list[str]:
    """One sentence for each thing that fails: what, where, by how much. Empty when the artifact passes.

    Differing token ids, logits that are not numbers, a runtime that is further from what it should compute than its
    rounding explains, and chunked prefill that is further from the reference than token by token fail whatever the
    gate says.

    Args:
        parity: from :func:`measure`.
        tokens: from :func:`edgekd.verify.tokens.check_tokens`.
        gate: the recipe's thresholds; null ones are not judged.
    """
    gated = [metric for metric in METRICS.values() if metric.gate]
    missed = (_missed(parity, metric, getattr(gate, str(metric.gate))) for metric in gated)
    return [*_token_failures(tokens), *_logit_failures(parity), *filter(None, missed)]


def _token_failures(tokens: TokenCheck | None) -> Iterator[str]:
    if tokens is None:
        yield "tokens: they were not compared"
        return
    counts = (
        ("string", tokens.strings, tokens.strings_identical),
        ("chat", tokens.chats, tokens.chats_identical),
        ("round trip", tokens.round_trips, tokens.round_trips_identical),
    )
    for kind, total, same in counts:
        if same < total:
            text = f"{total - same} of {total} {kind}s differ from the reference tokenizer's"
            first = next((d for d in tokens.differences if d.kind == kind), None)
            if first is not None:
                expected, runtime = _shown(first.expected), _shown(first.runtime)
                text += f", first {first.text!r:.80}: expected {expected}, got {runtime}"
            yield f"tokens: {text}"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _logit_failures(parity: Parity) -> Iterator[str]:
    if unusable := parity.unusable_positions:
        total = parity.windows * parity.window_tokens
        yield f"logits: unusable (not a number, or a KL without bound) at {unusable} of {total} positions"
    for size, chunk in parity.chunked_prefill.items():
        yield from _chunk_failures(size, chunk, parity.arithmetic_kl_mean or 0.0)
    floor, found = parity.arithmetic_kl_mean, parity.runtime_kl_mean
    if floor is not None and found is not None and found > _MARGIN * floor + _EXACT_KL:
        yield (
            f"runtime: KL {found:.3g} to the model it should compute, where the rounding of its arithmetic explains "
            f"{floor:.3g}: a fault of the export or the runtime"
        )


def first_windows(comparison: Comparison) -> float | None:
    """Mean KL of the windows that rounding is measured on; None where a logit is not usable."""
    kl = comparison.samples.get("kl_mean", [])[:NOISE_WINDOWS]
    return float(np.mean(kl)) if kl and not comparison.unusable_positions else None


def _chunk_failures(size: str, chunk: ChunkedPrefill, floor: float) -> Iterator[str]:
    """Rounding that depends on how a text is fed moves the logits about, and leaves them as far from the reference as
    they were; a wrong mask, position or cache does not."""
    near, far = chunk.kl_to_reference_token_by_token, chunk.kl_to_reference
    if chunk.kl_mean is None or near is None or far is None or chunk.kl_to_reference_change_error is None:
        return
    fed = "in one" if size == "all" else f"in chunks of {size}"
    room = _SIGMAS * chunk.kl_to_reference_change_error + _CHANGE * near + _MARGIN * floor + _EXACT_KL
    if abs(far - near) > room:
        yield f"chunked prefill: fed {fed}, KL to the reference is {far:.3g}, token by token {near:.3g}"
    elif chunk.kl_mean > _MARGIN * (near + floor) + _EXACT_KL:
        yield (
            f"chunked prefill: fed {fed}, KL to token by token is {chunk.kl_mean:.3g}, where both are within "
            f"{max(near, far):.3g} of the reference"
        )


def _missed(parity: Parity, metric: Metric, limit: float | None) -> str | None:
    """What is said of a figure that is on the wrong side of its threshold."""
    figure = parity.figure(metric.key)
    if limit is None:
        return None
    if (value := figure.value) is None:
        return f"{metric.key} could not be computed ({figure.reason}); its threshold {metric.gate} is {limit:.4g}"
    if metric.better == "higher":
        short = limit - value
        return f"{metric.key} {value:.4g} is below {limit:.4g} by {short:.2g}" if short > 0 else None
    at = parity.kl_max_at if metric.key.startswith("kl_") else None
    where = f" (worst at window {at.window}, token {at.token})" if at else ""
    return f"{metric.key} {value:.4g} exceeds {limit:.4g} by {value - limit:.2g}{where}" if value > limit else None

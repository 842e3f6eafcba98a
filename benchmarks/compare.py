"""Whether one artifact is faster than another: runs in the order ABBA or BAAB, drawn by chance, and a verdict.

A block is four processes. What drifts through a block, a machine that grows warm or a neighbour that wakes, meets both
artifacts alike, so a block gives one ratio; the verdict is about the median of the blocks' ratios.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..errors import EdgekdError
from ..manifest import Artifact
from ..proof import METRICS, Noise
from ..spec import BenchSpec
from . import measure
from .children import in_child
from .harness import Site, worst
from .machine import NoiseWatch, physical_cores
from .measure import OpenSession, Repetition
from .metrics import bootstrap, median, tokens_per_s

Verdict = Literal["faster", "slower", "no difference shown"]
COMPARED = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s")
"""What is compared; the first decides."""
MARGIN = 0.03
"""A smaller difference is nobody's: code that moved in memory makes as much."""
SIGNIFICANCE = 0.004
"""Twenty identical pairs are all silent in more than nine of ten times; nine blocks that agree reach it."""
_CONFIDENCE = 99.0
_DRAWS = 10_000


class Comparison(BaseModel):
    """One figure of two artifacts."""

    model_config = ConfigDict(frozen=True)

    key: str
    a: float
    b: float
    """Medians."""
    speedup: float
    """Of B over A, the median of the blocks' ratios: above 1 B is faster."""
    interval: tuple[float, float]
    """99 %, by bootstrap over the blocks."""
    p: float
    """Of so clear a difference by chance alone: Wilcoxon's signed-rank test over the blocks."""
    verdict: Verdict
    samples_a: list[float]
    samples_b: list[float]


class Compared(BaseModel):
    """Two artifacts, figure by figure."""

    model_config = ConfigDict(frozen=True)

    a: str
    b: str
    blocks: int
    prompt_tokens: int
    figures: list[Comparison]
    noise: Noise

    @property
    def verdict(self) -> Verdict:
        """Of decoding."""
        return self.figures[0].verdict


def judge(key: str, blocks: Sequence[tuple[float, float]], margin: float = MARGIN, seed: int = 0) -> Comparison:
    """The verdict over blocks.

    Args:
        blocks: of each, the mean of A's runs and of B's.
        margin: least difference to speak of.
    """
    sign = 1 if METRICS[key].better == "higher" else -1
    ratios = np.array([sign * math.log(b / a) for a, b in blocks])
    low, high = bootstrap(ratios, draws=_DRAWS, seed=seed, confidence=_CONFIDENCE)
    middle = float(np.median(ratios))
    p = signed_rank_p(ratios)
    verdict: Verdict = "no difference shown"
    if p < SIGNIFICANCE and abs(middle) >= math.log1p(margin):
        verdict = "faster" if middle > 0 else "slower"
    a, b = ([block[i] for block in blocks] for i in (0, 1))
    interval = (math.exp(low), math.exp(high))
    return Comparison(
        key=key,
        a=median(a),
        b=median(b),
        speedup=math.exp(middle),
        interval=interval,
        p=p,
        verdict=verdict,
        samples_a=a,
        samples_b=b,
    )


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, exact: no bell curve is asked for, and no wild block decides."""
    moved = differences[differences != 0]
    ranks = np.argsort(np.argsort(np.abs(moved))) + 1
    positive = int(ranks[moved > 0].sum())
    total = len(moved) * (len(moved) + 1) // 2
    ways = np.zeros(total + 1)
    ways[0] = 1  # of the ranks' subsets, how many have each sum
    for rank in range(1, len(moved) + 1):
        ways[rank:] += ways[:-rank].copy()
    tail = ways[: min(positive, total - positive) + 1].sum() / 2.0 ** len(moved)
    return float(min(1.0, 2 * tail))


def compare(
    open_session: OpenSession,
    a: Artifact,
    b: Artifact,
    spec: BenchSpec,
    *,
    blocks: int = 12,
    margin: float = MARGIN,
    seed: int = 0,
    on_run: Callable[[int, int], None] | None = None,
    site: Site | None = None,
) -> Compared:
    """Run both in blocks of four fresh processes and judge.

    Args:
        spec: its longest prompt, tokens to decode and threads are taken.
        site: where they run; None: here.

    Raises:
        EdgekdError: the prompt does not fit, or a child process failed.
    """
    prompt = max(spec.prompt_tokens)
    for artifact in (a, b):
        if prompt + spec.decode_tokens > artifact.manifest.contract.context_length:
            raise EdgekdError(
                f"{prompt} + {spec.decode_tokens} tokens exceed the context of {artifact.folder}, "
                f"{artifact.manifest.contract.context_length}.",
                "Lower --prompt-tokens or --decode-tokens.",
            )
    threads, noises = spec.threads or physical_cores(), list[Noise]()

    def once(artifact: Artifact) -> Repetition:
        what = f"a run of {artifact.folder.name}"
        if site:
            run, noise = site.repetition(what, artifact, [prompt], spec.decode_tokens)
            noises.append(noise)
            return run
        args = (open_session, artifact, [prompt], spec.decode_tokens, threads)
        alone: Repetition = in_child(what, measure.repetition, *args)
        return alone

    watch, measured, done = NoiseWatch(), [], 0
    for order in _orders(blocks, seed):
        found: dict[str, list[Repetition]] = {"A": [], "B": []}
        for letter in order:
            found[letter].append(once(a if letter == "A" else b))
            done += 1
            if on_run:
                on_run(done, 4 * blocks)
        measured.append(found)
    figures = []
    for key in COMPARED:
        means = [(_mean(key, block["A"], prompt), _mean(key, block["B"], prompt)) for block in measured]
        known = [(x, y) for x, y in means if x is not None and y is not None]
        if len(known) == blocks:
            figures.append(judge(key, known, margin, seed))
    names, noise = (str(a.folder), str(b.folder)), worst(noises) if site else watch.noise()
    return Compared(a=names[0], b=names[1], blocks=blocks, prompt_tokens=prompt, figures=figures, noise=noise)


def _orders(blocks: int, seed: int) -> Iterable[str]:
    """As many of each order as can be, in an order drawn by chance."""
    orders = ["ABBA", "BAAB"] * (blocks // 2) + ["ABBA"] * (blocks % 2)
    random.Random(seed).shuffle(orders)
    return orders


def _mean(key: str, runs: Sequence[Repetition], prompt: int) -> float | None:
    """Of a figure over runs; None where one has none."""
    samples = [_sample(key, run, prompt) for run in runs]
    known = [sample for sample in samples if sample is not None]
    return sum(known) / len(known) if len(known) == len(samples) else None


def _sample(key: str, run: Repetition, prompt: int) -> float | None:
    match key:
        case "decode_tokens_per_s":
            return tokens_per_s(run.decode.decode_tokens, run.decode.decode_s)
        case "prefill_tokens_per_s":
            return tokens_per_s(prompt, run.warm[prompt].prefill_s)
        case _:
            return run.warm[prompt].ttft_s

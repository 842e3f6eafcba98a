"""Time an artifact as its runtime runs it, each repetition in a fresh process.

A repetition opens the artifact, runs one generation that is not counted, times every prompt length, then decodes after
the longest prompt. Time to first token runs from the ids in hand to the first token chosen; tokenizing is timed apart.
Nothing here imports a runtime: the child calls the function it is given.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import psutil

from ..errors import EdgekdError
from ..manifest import Artifact, Traffic
from ..proof import Benchmark, BenchSettings, Figure, Host, figure
from ..session import Session, sample
from ..spec import BenchSpec
from .metrics import (
    bandwidth_buffer_bytes,
    bandwidth_samples,
    decode_roofline_fraction,
    last_level_cache_bytes,
    median,
    percentile,
    tokens_per_s,
)

_CLOCK = "measured:clock"
_PEAK_RSS_SOURCE = "measured:VmHWM" if sys.platform == "linux" else "measured:ru_maxrss"
_WARM_UP_TOKENS = 8


class OpenSession(Protocol):
    """A function at the head of a module, so that a fresh process can import it."""

    def __call__(self, artifact: Artifact, *, threads: int | None = None) -> Session: ...


@dataclass(frozen=True)
class _Repetition:
    """What one process measured; what depends on the prompt, by its length."""

    load_s: float
    tokenize_s: Mapping[int, float]
    prefill_s: Mapping[int, float]
    ttft_s: Mapping[int, float]
    inter_token_s: Sequence[float]
    sampling_s: Sequence[float]
    rss_before_load_bytes: int
    peak_rss_bytes: int
    torch_in_process: bool


def bench(
    open_session: OpenSession,
    artifact: Artifact,
    spec: BenchSpec,
    *,
    on_run: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Measure load time, time to first token, prefill and decode speed, and memory.

    Args:
        open_session: opens the artifact in each child process.
        artifact: what to measure.
        spec: prompt lengths, tokens to decode, repetitions, threads.
        on_run: told after each repetition how many are done, and of how many.

    Raises:
        EdgekdError: prompt and decoded tokens exceed the context, or a child process failed or died.
    """
    context = artifact.manifest.contract.context_length
    longest = max(spec.prompt_tokens)
    if longest + spec.decode_tokens > context:
        raise EdgekdError(
            f"bench.prompt_tokens {longest} and bench.decode_tokens {spec.decode_tokens} exceed the context of "
            f"{artifact.manifest.name}, {context} tokens.",
            "Lower one of them in the spec.",
        )
    threads = spec.threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1
    machine = describe_machine()
    buffer_bytes = bandwidth_buffer_bytes()
    runs: list[_Repetition] = []
    for number in range(1, spec.runs + 1):
        what = f"the benchmark of {artifact.manifest.name} (run {number} of {spec.runs})"
        runs.append(_in_child(what, _measure_run, open_session, artifact, spec, threads))
        if on_run:
            on_run(number, spec.runs)
    # Last: giving a gigabyte back slowed the prefill of a run right behind it by 8 %.
    bandwidth = _in_child("the bandwidth measurement", bandwidth_samples, threads, buffer_bytes)
    settings = BenchSettings(
        threads=threads,
        prompt_tokens=sorted(set(spec.prompt_tokens)),
        decode_tokens=spec.decode_tokens,
        decode_after_tokens=longest,
        runs=spec.runs,
        warm_up=f"{longest} tokens prefilled and {_WARM_UP_TOKENS} decoded in every run, not counted",
        bandwidth_buffer_bytes=buffer_bytes,
        torch_in_process=any(run.torch_in_process for run in runs),
    )
    return _medians(runs, spec, _traffic_of(artifact), bandwidth, settings, machine)


def _medians(
    runs: Sequence[_Repetition],
    spec: BenchSpec,
    traffic: Traffic,
    bandwidth: list[float],
    settings: BenchSettings,
    machine: Host,
) -> Benchmark:
    """Medians over the runs, each with its samples."""
    lengths = settings.prompt_tokens
    intervals = [seconds for run in runs for seconds in run.inter_token_s]
    decode = [tokens_per_s(spec.decode_tokens, sum(run.inter_token_s)) for run in runs]
    read = traffic.bytes_per_token(lengths[-1] + spec.decode_tokens / 2)
    roofline = [decode_roofline_fraction(rate, read, max(bandwidth)) for rate in decode]

    def of_runs(key: str, samples: Sequence[float], source: str = _CLOCK) -> Figure:
        return figure(key, median(samples), source, samples)

    def by_length(key: str, sample: Callable[[_Repetition, int], float]) -> dict[str, Figure]:
        return {str(length): of_runs(key, [sample(run, length) for run in runs]) for length in lengths}

    def inter_token(q: float) -> Figure:
        each = [percentile(run.inter_token_s, q) for run in runs]
        return figure(f"inter_token_p{q:.0f}_s", percentile(intervals, q), _CLOCK, each)

    return Benchmark(
        settings=settings,
        machine=machine,
        load_s=of_runs("load_s", [run.load_s for run in runs]),
        tokenize_s=by_length("tokenize_s", lambda run, n: run.tokenize_s[n]),
        ttft_s=by_length("ttft_s", lambda run, n: run.ttft_s[n]),
        prefill_tokens_per_s=by_length("prefill_tokens_per_s", lambda run, n: tokens_per_s(n, run.prefill_s[n])),
        decode_tokens_per_s=of_runs("decode_tokens_per_s", decode),
        inter_token_s=of_runs("inter_token_s", intervals),
        sampling_s=of_runs("sampling_s", [seconds for run in runs for seconds in run.sampling_s]),
        inter_token_p50_s=inter_token(50),
        inter_token_p95_s=inter_token(95),
        peak_rss_bytes=of_runs("peak_rss_bytes", [run.peak_rss_bytes for run in runs], _PEAK_RSS_SOURCE),
        rss_before_load_bytes=of_runs(
            "rss_before_load_bytes", [run.rss_before_load_bytes for run in runs], "measured:psutil"
        ),
        bandwidth_bytes_per_s=figure("bandwidth_bytes_per_s", max(bandwidth), "measured:numpy-read", bandwidth),
        bytes_per_token=figure("bytes_per_token", read, "computed:manifest"),
        decode_roofline_fraction=of_runs("decode_roofline_fraction", roofline),
    )


def _traffic_of(artifact: Artifact) -> Traffic:
    """What the exporter said; where it said nothing, all weights and no cache."""
    manifest = artifact.manifest
    weight_bytes = round(manifest.parameters * manifest.bits_per_weight / 8)
    return manifest.traffic or Traffic(weight_bytes=weight_bytes, kv_bytes_per_position=0)


def describe_machine() -> Host:
    """The machine the figures belong to, and how busy it was."""
    return Host(
        cpu=_cpu_name(),
        cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        last_level_cache_bytes=last_level_cache_bytes(),
        ram_bytes=psutil.virtual_memory().total,
        os=platform.platform(),
        architecture=platform.machine(),
        python=platform.python_version(),
        load_average_1min=psutil.getloadavg()[0],
    )


def _cpu_name() -> str | None:
    if sys.platform == "darwin":
        answer = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return answer.stdout.strip() or None
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return platform.processor() or None
    names = {key.strip(): value.strip() for key, _, value in lines}
    return names.get("model name") or names.get("Model") or names.get("Hardware") or platform.processor() or None


def _peak_rss_bytes() -> int:
    """Most memory that this process has had resident."""
    if sys.platform == "linux":
        # ru_maxrss survives exec: a child starts with its parent's peak.
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _ordinary_ids(session: Session, count: int) -> list[int]:
    """Pseudo-random ids that stand for text, the same in every run."""
    rng = np.random.default_rng(0)
    ids: list[int] = []
    for _ in range(64 * count):
        token = int(rng.integers(session.vocab_size))
        if session.token_bytes(token):
            ids.append(token)
        if len(ids) == count:
            return ids
    raise EdgekdError("the artifact's tokenizer has hardly any token that stands for text.", "Export it again.")


def _measure_run(open_session: OpenSession, artifact: Artifact, spec: BenchSpec, threads: int) -> _Repetition:
    """One repetition, in the child."""
    rng = np.random.default_rng(0)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    session = open_session(artifact, threads=threads)
    load = time.perf_counter() - start
    try:
        lengths = sorted(set(spec.prompt_tokens))
        ids = _ordinary_ids(session, lengths[-1])
        session.reset()
        token = sample(session.prefill(ids), 0.0, rng)
        for _ in range(min(_WARM_UP_TOKENS, spec.decode_tokens)):
            token = sample(session.decode(token), 0.0, rng)

        ttft, prefill, tokenize = {}, {}, {}
        for length in lengths:
            text = b"".join(map(session.token_bytes, ids[:length])).decode("utf-8", "replace")
            start = time.perf_counter()
            session.tokenize(text)
            tokenize[length] = time.perf_counter() - start
            session.reset()
            start = time.perf_counter()
            logits = session.prefill(ids[:length])
            prefill[length] = time.perf_counter() - start
            token = sample(logits, 0.0, rng)
            ttft[length] = time.perf_counter() - start

        intervals, sampling = [], []
        last = time.perf_counter()
        for _ in range(spec.decode_tokens):
            logits = session.decode(token)
            decoded = time.perf_counter()
            token = sample(logits, 0.0, rng)
            now = time.perf_counter()
            sampling.append(now - decoded)
            intervals.append(now - last)
            last = now
    finally:
        session.close()
    return _Repetition(
        load_s=load,
        tokenize_s=tokenize,
        prefill_s=prefill,
        ttft_s=ttft,
        inter_token_s=intervals,
        sampling_s=sampling,
        rss_before_load_bytes=before,
        peak_rss_bytes=_peak_rss_bytes(),
        torch_in_process="torch" in sys.modules,
    )


def _in_child(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` in a fresh process and return what it returns.

    Raises:
        EdgekdError: the child raised, or died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    try:
        wait([receiver, process.sentinel])
        try:
            kind, value = receiver.recv()
        except EOFError:
            process.join()
            raise _death(what, process.exitcode) from None
    finally:
        # Ctrl-C lands here too: no child outlives this call.
        process.join(timeout=0 if sys.exc_info()[0] else 5)
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
    if kind == "error":
        raise EdgekdError(f"{what} failed: {value[0]}", value[1])
    return value


def _child(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Entry point of a child process: one message back, then exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and kills
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        message = ("ok", function(*args))
    except EdgekdError as error:
        message = ("error", (error.cause, error.remedy))
    except Exception as error:  # a runtime may raise anything; the user gets one sentence
        message = ("error", (f"{type(error).__name__}: {error}", "Try: edgekd doctor"))
    sender.send(message)
    sender.close()


def _die_with_parent() -> None:
    """Wait for the parent's end, however it comes, and follow."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _death(what: str, exitcode: int | None) -> EdgekdError:
    """The error for a child that died without a word."""
    remedy = "Find out whether the runtime works here: edgekd doctor"
    if exitcode is None or exitcode >= 0:
        return EdgekdError(f"{what} ended without a result (exit code {exitcode}).", remedy)
    known = {int(number): number.name for number in signal.Signals}
    if known.get(-exitcode) == "SIGKILL":
        remedy = f"Memory may have run out: free some, or use a smaller model. {remedy}"
    return EdgekdError(f"{what} was ended by {known.get(-exitcode, f'signal {-exitcode}')}.", remedy)

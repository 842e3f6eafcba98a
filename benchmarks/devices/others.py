"""Runners that are not ours: llama.cpp's ``llama-bench`` and ExecuTorch's ``llama_main``. What they do not tell is null
with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import EdgekdError
from ...files import Json
from ...manifest import Artifact
from ...proof import Benchmark, BenchSettings, Figure, Host, Noise, PhaseMemory, figure, unknown
from ...spec import BenchSpec
from ..harness import energies, of_runs, traffic_of, worst
from ..metrics import tokens_per_s
from .place import Place, reads_answers
from .readings import Tick, noise_of

_MARK = "PyTorchObserver "
_MILLISECONDS = "measured:llama_main, whole milliseconds"
Figures = dict[str, object]


@dataclass(frozen=True)
class Job:
    """An artifact on the device and what is done with it."""

    place: Place
    runner: str
    files: Mapping[str, str]
    """Paths there, by the artifact's own names."""
    prompts: Mapping[int, str]
    """Files there, by the number of their tokens."""
    artifact: Artifact
    spec: BenchSpec
    threads: int
    host: Host

    @property
    def lengths(self) -> list[int]:
        """Of the prompts, the shortest first."""
        return sorted(set(self.spec.prompt_tokens))

    @property
    def model(self) -> str:
        """The path of the model there."""
        return self.files[self.artifact.manifest.main_file]


@dataclass
class _Watched:
    """Of every process of one kind its looks, and the noise of each repetition."""

    prefill: list[Sequence[Tick]] = field(default_factory=list)
    decode: list[Sequence[Tick]] = field(default_factory=list)
    noises: list[Noise] = field(default_factory=list)


def _noisy(place: Place, noises: list[Noise], work: Callable[[], None]) -> None:
    """Do some work between two looks at the device."""
    before = place.state()
    work()
    noises.append(noise_of(before, place.state()))


# --- llama-bench ------------------------------------------------------------------------------------------------------


@reads_answers
def llama_bench(job: Job, on_run: Callable[[int, int], None] | None = None) -> Benchmark:
    """Prefill and decode of ids that llama-bench draws by chance; two fresh processes a repetition.

    Raises:
        EdgekdError: it failed, or said what is no result.
    """
    longest, decode, runs = job.lengths[-1], job.spec.decode_tokens, job.spec.runs
    prompts: dict[int, list[float]] = {n: [] for n in job.lengths}
    rates, watched, build = list[float](), _Watched(), ""
    shared = [job.runner, "-m", job.model, "-t", str(job.threads), "-r", "1", "-fa", "1", "-o", "json"]

    def once() -> None:
        nonlocal build
        rows, ticks = _bench(job, [*shared, "-p", ",".join(map(str, job.lengths)), "-n", "0"])
        for row in rows:
            prompts[int(row["n_prompt"])] += _speeds(row, row["n_prompt"])
            build = f"llama.cpp {row['build_commit']} ({row['build_number']}), {row['backends']}"
        watched.prefill.append(ticks)
        rows, ticks = _bench(job, [*shared, "-p", "0", "-n", str(decode), "-d", str(longest)])
        for row in rows:
            rates.extend(_speeds(row, row["n_gen"]))
        watched.decode.append(ticks)

    for run in range(runs):
        _noisy(job.place, watched.noises, once)
        if on_run:
            on_run(run + 1, runs)
    if not rates or any(not found for found in prompts.values()):
        raise EdgekdError(f"{job.place.device.name}: llama-bench measured less than it was asked.", "Build it again.")
    source = "measured:llama-bench"
    none = {
        "ttft_s": "llama-bench reads no text",
        "tokenize_s": "llama-bench reads no text",
        "first_token_s": "llama-bench chooses no token",
    }
    figures: Figures = {key: {str(n): unknown(key, why) for n in prompts} for key, why in none.items()}
    figures |= {
        "prefill_tokens_per_s": {str(n): of_runs("prefill_tokens_per_s", s, source) for n, s in prompts.items()},
        "decode_tokens_per_s": of_runs("decode_tokens_per_s", rates, source),
        **_unknown(("itl_s", "icl_s", "icl_p50_s", "icl_p95_s", "icl_p99_s"), "llama-bench writes no text"),
        **_unknown(("load_s", "first_ttft_s", "cold_ttft_s", "sampling_s"), "llama-bench does not tell"),
        **energies("llama-bench does not tell when it measured what"),
    }
    warm_up = "llama-bench's own: each kind of work once in every process, not counted"
    return _benchmark(job, figures, watched, warm_up, f"llama-bench, {build}")


def _bench(job: Job, command: Sequence[str]) -> tuple[list[Json], Sequence[Tick]]:
    ran = job.place.run(f"llama-bench with {job.artifact.manifest.name}", command)
    return json.loads(ran.output), ran.ticks


def _speeds(row: Json, tokens: int) -> list[float]:
    return [tokens_per_s(tokens, nanoseconds / 1e9) for nanoseconds in row["samples_ns"]]


# --- llama_main -------------------------------------------------------------------------------------------------------


@reads_answers
def llama_main(job: Job, on_run: Callable[[int, int], None] | None = None) -> Benchmark:
    """Greedy requests with the clock of ExecuTorch's runner, which counts whole milliseconds; a fresh process each, in
    which the same request has run once before.

    Raises:
        EdgekdError: it failed, or read another number of tokens.
    """
    runs, lengths, decode = job.spec.runs, job.lengths, job.spec.decode_tokens
    told: dict[int, list[Json]] = {n: [] for n in lengths}
    watched = _Watched()

    def once() -> None:
        for n in lengths:
            tokens = decode if n == lengths[-1] else 1
            stats, ticks = _observed(job, n, tokens)
            told[n].append(stats)
        watched.decode.append(ticks)

    for run in range(runs):
        _noisy(job.place, watched.noises, once)
        if on_run:
            on_run(run + 1, runs)
    last = told[lengths[-1]]
    figures: Figures = {
        # It stops its clock when the first token is chosen: making text of it is microseconds.
        "ttft_s": {str(n): _seconds("ttft_s", found, "inference_start", "first_token") for n, found in told.items()},
        "prefill_tokens_per_s": {
            str(n): of_runs(
                "prefill_tokens_per_s",
                [_rate(s["prompt_tokens"], s, "inference_start_ms", "prompt_eval_end_ms") for s in found],
                f"{_MILLISECONDS}, tokenizer included",
                "too short for whole milliseconds",
            )
            for n, found in told.items()
        },
        "decode_tokens_per_s": of_runs(
            "decode_tokens_per_s",
            [_rate(s["generated_tokens"], s, "prompt_eval_end_ms", "inference_end_ms") for s in last],
            _MILLISECONDS,
            "the text ended at once, and llama_main stops there",
        ),
        "load_s": _seconds("load_s", last, "model_load_start", "model_load_end"),
        "tokenize_s": {str(n): unknown("tokenize_s", "llama_main does not tell") for n in lengths},
        "first_token_s": {str(n): unknown("first_token_s", "llama_main does not tell") for n in lengths},
        **_unknown(
            ("itl_s", "icl_s", "icl_p50_s", "icl_p95_s", "icl_p99_s", "first_ttft_s", "cold_ttft_s", "sampling_s"),
            "llama_main does not tell",
        ),
        **energies("llama_main does not tell when it measured what"),
    }
    warm_up = "the same request once before in every process, not counted"
    return _benchmark(job, figures, watched, warm_up, "llama_main")


def _observed(job: Job, length: int, tokens: int) -> tuple[Json, Sequence[Tick]]:
    """What the runner says of the second of two equal requests."""
    flags = {
        "model_path": job.model,
        "tokenizer_path": job.files["tokenizer.json"],
        "temperature": 0,
        "seq_len": length + 1 + tokens,
        "cpu_threads": job.threads,
        "warmup": "true",
    }
    # The prompt is an argument, read from its file there; $( ) alone would eat its last line ends.
    script = 'text=$(cat "$1"; echo .); shift; exec "$@" --prompt="${text%.}"'
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = ["sh", "-c", script, "sh", job.prompts[length], job.runner, *words]
    ran = job.place.run(f"llama_main with {job.artifact.manifest.name}", command)
    reports = [line[len(_MARK) :] for line in ran.output.splitlines() if line.startswith(_MARK)]
    stats: Json = json.loads(reports[-1])
    if stats["prompt_tokens"] != length:
        raise EdgekdError(
            f"llama_main reads {stats['prompt_tokens']} tokens where edgekd reads {length}.", "Take a newer one."
        )
    return stats, ran.ticks


def _seconds(key: str, found: Sequence[Json], begin: str, end: str) -> Figure:
    return of_runs(key, [(s[f"{end}_ms"] - s[f"{begin}_ms"]) / 1000 for s in found], _MILLISECONDS)


def _rate(tokens: int, stats: Json, begin: str, end: str) -> float | None:
    seconds = (stats[end] - stats[begin]) / 1000
    return tokens_per_s(tokens, seconds) if tokens and seconds > 0 else None


# --- both -------------------------------------------------------------------------------------------------------------


def _unknown(keys: Sequence[str], why: str) -> dict[str, Figure]:
    return {key: unknown(key, why) for key in keys}


def _benchmark(job: Job, figures: Figures, watched: _Watched, warm_up: str, build: str) -> Benchmark:
    spec, manifest = job.spec, job.artifact.manifest
    longest = job.lengths[-1]
    settings = BenchSettings(
        ttft_from="text",
        threads=job.threads,
        prompt_tokens=job.lengths,
        decode_tokens=spec.decode_tokens,
        decode_after_tokens=longest,
        context_length=manifest.contract.context_length,
        runs=spec.runs,
        warm_up=warm_up,
        torch_in_process=False,
    )
    read = traffic_of(job.artifact).bytes_per_token(longest + spec.decode_tokens / 2)
    phases = {name: _memory(found) for name in ("prefill", "decode") if (found := getattr(watched, name))}
    peaks = [tick.peak_rss for found in (*watched.prefill, *watched.decode) for tick in found if tick.peak_rss]
    shared: Figures = {
        "settings": settings,
        "machine": job.host.model_copy(update={"runtime_build": f"{build}, {job.host.runtime_build}"}),
        "noise": worst(watched.noises),
        "bytes_per_token": figure("bytes_per_token", read, "computed:manifest"),
        "memory": phases,
        "peak_rss_bytes": of_runs("peak_rss_bytes", [max(peaks)] if peaks else [], "measured:VmHWM", _NOT_SEEN),
    }
    return Benchmark.model_validate(shared | figures)


_NOT_SEEN = "the system did not tell, or the process had ended before it was asked"


def _memory(processes: Sequence[Sequence[Tick]]) -> PhaseMemory:
    """Of each process what it held when it was last looked at."""
    last = [next((tick for tick in reversed(ticks) if tick.peak_rss), None) for ticks in processes]
    known = [tick for tick in last if tick]

    def of(key: str, values: Sequence[int | None]) -> Figure:
        return of_runs(key, values, "measured:proc-status", _NOT_SEEN)

    return PhaseMemory(
        peak_rss_bytes=of("peak_rss_bytes", [tick.peak_rss for tick in known]),
        anonymous_bytes=of("anonymous_bytes", [tick.anonymous for tick in known]),
        file_backed_bytes=of("file_backed_bytes", [tick.file_backed for tick in known]),
        swap_bytes=of("swap_bytes", [tick.swap for tick in known]),
    )

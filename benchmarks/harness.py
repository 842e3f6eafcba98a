"""Time artifacts as their runtimes run them: medians over fresh processes, in turns where there are several.

What is measured stands in ``definitions``, what a process does in ``measure``. Nothing here imports a runtime: the
child calls the function it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import EdgekdError
from ..manifest import Artifact, Traffic
from ..proof import (
    METRICS,
    Benchmark,
    BenchSettings,
    Energy,
    Figure,
    Host,
    Noise,
    PhaseMemory,
    Sustained,
    figure,
    unknown,
)
from ..spec import BenchSpec
from . import measure
from .children import Limits, in_child, in_turns, now
from .energy import APART, EnergyRun, Window, energy_run, no_counter, refusal
from .machine import (
    NoiseWatch,
    bandwidth_buffer_bytes,
    bandwidth_samples,
    describe_machine,
    last_level_cache_bytes,
    physical_cores,
)
from .measure import WARM_UP_TOKENS, ColdStart, CurvePoint, OpenSession, Repetition, curve_lengths
from .memory import NOT_LINUX, Phase, drop_from_page_cache
from .metrics import bootstrap_median, decode_roofline_fraction, median, percentile, tokens_per_s
from .sustained import sustained

__all__ = ["ONE_RUN", "Measured", "OpenSession", "Site", "bench", "bench_at", "bench_in_turns", "describe_machine"]
ONE_RUN: Mapping[str, Any] = {"runs": 1, "cold_runs": 0, "curve_seconds": 0, "energy_seconds": 0}
"""Keys of the spec for who takes turns himself."""
_CLOCK = "measured:clock"
_NO_TEXT = "no token that was drawn has text"
_NO_BANDWIDTH = "the bandwidth of a device is not measured"
Measured = Benchmark | EdgekdError
"""What came of an artifact."""


@dataclass
class _Samples:
    """What the processes of one artifact have measured so far."""

    artifact: Artifact
    runs: list[Repetition] = field(default_factory=list)
    cold: list[ColdStart] = field(default_factory=list)
    curve: Mapping[int, CurvePoint] = field(default_factory=dict)
    noises: list[Noise] = field(default_factory=list)
    energy: EnergyRun | str = "no energy counter was read"
    """Or why there is none."""
    sustained: Sustained | None = None


class Site(Protocol):
    """Where artifacts run while they are timed: this machine, or a device. ``what`` is the work, for messages.

    Every method raises an ``EdgekdError`` where the work fails.
    """

    @property
    def threads(self) -> int:
        """That a runtime is given."""
        ...

    @property
    def limits(self) -> Limits | None:
        """Of the device that this machine stands for."""
        ...

    @property
    def buffer_bytes(self) -> int | None:
        """Over which the bandwidth is measured; None: it is not."""
        ...

    def hosts(self) -> Sequence[Host]:
        """For each artifact the machine, with the build of its runtime."""
        ...

    def bandwidth(self) -> list[float]:
        """Bytes read per second, of each pass; none where it is not measured."""
        ...

    def repetition(
        self, what: str, artifact: Artifact, lengths: Sequence[int], decode_tokens: int
    ) -> tuple[Repetition, Noise]:
        """One process that does what ``measure.repetition`` does, and what disturbed it."""
        ...

    def cold_start(self, what: str, artifact: Artifact, run: Repetition) -> ColdStart:
        """One that begins with nothing in memory; its prompt is the shortest of the run's."""
        ...

    def curves(self, what: str, artifact: Artifact, lengths: Sequence[int], seconds: float) -> Mapping[int, CurvePoint]:
        """A request of each length, as long as there is time."""
        ...

    def energy(
        self, what: str, artifact: Artifact, prompt_tokens: int, decode_tokens: int, seconds: float
    ) -> EnergyRun | str:
        """Windows of energy, or why there are none."""
        ...

    def sustained(self, what: str, artifact: Artifact, seconds: float) -> Sustained:
        """Decoding without a pause."""
        ...


@dataclass(frozen=True)
class _Here:
    """This machine: fresh processes that call ``open_session``."""

    open_session: OpenSession
    threads: int
    limits: Limits | None
    builds: Sequence[str | None]
    gpus: Sequence[str | None]
    buffer_bytes: int

    def hosts(self) -> Sequence[Host]:
        return [describe_machine(build, gpu) for build, gpu in zip(self.builds, self.gpus, strict=True)]

    def bandwidth(self) -> list[float]:
        samples: list[float] = in_child("the bandwidth measurement", bandwidth_samples, self.threads, self.buffer_bytes)
        return samples

    def repetition(
        self, what: str, artifact: Artifact, lengths: Sequence[int], decode_tokens: int
    ) -> tuple[Repetition, Noise]:
        def attempt() -> Repetition:
            args = (self.open_session, artifact, lengths, decode_tokens, self.threads)
            run: Repetition = in_child(what, measure.repetition, *args, limits=self.limits)
            return run

        return _undisturbed(attempt)

    def cold_start(self, what: str, artifact: Artifact, run: Repetition) -> ColdStart:
        drop_from_page_cache(artifact.path(name) for name in artifact.manifest.files)
        room = artifact.manifest.contract.context_length - min(run.warm)
        args = (self.open_session, artifact, run.shortest_text, room, self.threads, now())
        start: ColdStart = in_child(what, measure.cold_start, *args, limits=self.limits)
        return start

    def curves(self, what: str, artifact: Artifact, lengths: Sequence[int], seconds: float) -> Mapping[int, CurvePoint]:
        args = (self.open_session, artifact, lengths, self.threads, seconds)
        points: Mapping[int, CurvePoint] = in_child(what, measure.curves, *args, limits=self.limits)
        return points

    def energy(
        self, what: str, artifact: Artifact, prompt_tokens: int, decode_tokens: int, seconds: float
    ) -> EnergyRun | str:
        if why := no_counter():
            return why
        args = (self.open_session, artifact, prompt_tokens, decode_tokens, self.threads, seconds)
        run: EnergyRun | str = in_child(what, energy_run, *args, limits=self.limits)
        return run

    def sustained(self, what: str, artifact: Artifact, seconds: float) -> Sustained:
        args = (self.open_session, artifact, self.threads, seconds)
        found: Sustained = in_child(what, sustained, *args, limits=self.limits)
        return found


@dataclass(frozen=True)
class _Plan:
    """What is done with each artifact."""

    site: Site
    spec: BenchSpec

    @property
    def lengths(self) -> list[int]:
        """Of the prompts, the shortest first."""
        return sorted(set(self.spec.prompt_tokens))


def bench(
    open_session: OpenSession,
    artifact: Artifact,
    spec: BenchSpec,
    *,
    on_run: Callable[[int, int], None] | None = None,
    runtime_build: str | None = None,
    limits: Limits | None = None,
) -> Benchmark:
    """Measure one artifact; see ``bench_in_turns``.

    Raises:
        EdgekdError: prompt and decoded tokens exceed the context, or a child process failed or died.
    """
    builds = [runtime_build]
    (measured,) = bench_in_turns(open_session, [artifact], spec, on_run=on_run, builds=builds, limits=limits)
    if isinstance(measured, EdgekdError):
        raise measured
    return measured


def bench_in_turns(
    open_session: OpenSession,
    artifacts: Sequence[Artifact],
    spec: BenchSpec,
    *,
    on_run: Callable[[int, int], None] | None = None,
    builds: Sequence[str | None] | None = None,
    gpus: Sequence[str | None] | None = None,
    limits: Limits | None = None,
) -> list[Measured]:
    """Measure load, TTFT cold, first and warm, prefill and decode, their curves, and memory by phase.

    Args:
        open_session: opens an artifact in each child process.
        spec: prompt lengths, tokens to decode, repetitions, threads.
        on_run: told after each process how many are done, and of how many.
        builds: the runtime's version and flags, for each artifact.
        gpus: what beside the CPU computes each of them.
        limits: of the device that this machine stands for.

    Returns:
        For each artifact its benchmark, or why it has none: the others go on.

    Raises:
        EdgekdError: prompt and decoded tokens exceed an artifact's context.
    """
    threads = spec.threads or (limits and limits.threads) or physical_cores()
    none = [None] * len(artifacts)
    site = _Here(open_session, threads, limits, builds or none, gpus or none, bandwidth_buffer_bytes())
    return bench_at(site, artifacts, spec, on_run=on_run)


def bench_at(
    site: Site, artifacts: Sequence[Artifact], spec: BenchSpec, *, on_run: Callable[[int, int], None] | None = None
) -> list[Measured]:
    """The same anywhere; see ``bench_in_turns``."""
    for artifact in artifacts:
        check_context(artifact, spec)
    plan, hosts = _Plan(site, spec), site.hosts()
    bandwidth = site.bandwidth()
    gathered: list[_Samples | EdgekdError] = [_Samples(artifact) for artifact in artifacts]
    rounds = in_turns(len(artifacts), len(_steps(spec)))
    for number, turn in enumerate(rounds):
        for done, i in enumerate(turn):
            gathered[i] = _go_on(gathered[i], plan, number)
            if on_run:
                on_run(number * len(turn) + done + 1, len(rounds) * len(turn))
    # Behind the runs too: giving gigabytes back slowed the prefill of a run right behind it by 8 %.
    bandwidth += site.bandwidth()
    return [
        samples if isinstance(samples, EdgekdError) else _Summary(samples, plan, bandwidth).of(host)
        for samples, host in zip(gathered, hosts, strict=True)
    ]


def check_context(artifact: Artifact, spec: BenchSpec) -> None:
    """Refuse lengths that an artifact does not hold.

    Raises:
        EdgekdError: prompt and decoded tokens exceed its context.
    """
    context, longest = artifact.manifest.contract.context_length, max(spec.prompt_tokens)
    if longest + spec.decode_tokens > context:
        raise EdgekdError(
            f"bench.prompt_tokens {longest} and bench.decode_tokens {spec.decode_tokens} exceed the context of "
            f"{artifact.manifest.name}, {context} tokens.",
            "Lower one of them in the spec.",
        )


def _steps(spec: BenchSpec) -> list[Callable[[str, _Samples, _Plan], None]]:
    """What is done with each artifact, a process each."""
    return [
        *[_repeat] * spec.runs,
        *[_start_cold] * spec.cold_runs,
        *[_draw_curves] * (spec.curve_seconds > 0),
        *[_read_counters] * (spec.energy_seconds > 0),
        *[_sustain] * (spec.sustained_minutes > 0),
    ]


def _go_on(so_far: _Samples | EdgekdError, plan: _Plan, number: int) -> _Samples | EdgekdError:
    """Do the next of an artifact's processes; one that failed before is left alone."""
    if isinstance(so_far, EdgekdError):
        return so_far
    try:
        _do(so_far, plan, number)
    except EdgekdError as error:
        return error
    return so_far


def _do(samples: _Samples, plan: _Plan, number: int) -> None:
    steps = _steps(plan.spec)
    what = f"the benchmark of {samples.artifact.manifest.name} (run {number + 1} of {len(steps)})"
    steps[number](what, samples, plan)


def _repeat(what: str, samples: _Samples, plan: _Plan) -> None:
    run, noise = plan.site.repetition(what, samples.artifact, plan.lengths, plan.spec.decode_tokens)
    samples.runs.append(run)
    samples.noises.append(noise)


def _undisturbed(attempt: Callable[[], Repetition]) -> tuple[Repetition, Noise]:
    """A repetition and what disturbed it; one that was disturbed is tried once more, and the quieter is taken."""
    found = []
    for _ in range(2):
        watch = NoiseWatch()
        run = attempt()
        found.append((run, watch.noise()))
        if not found[-1][1].dirty:
            break
    run, noise = min(found, key=lambda pair: (len(pair[1].dirty), pair[1].others_cpu_share or 0.0))
    return run, noise.model_copy(update={"repeated": len(found) > 1})


def _start_cold(what: str, samples: _Samples, plan: _Plan) -> None:
    samples.cold.append(plan.site.cold_start(what, samples.artifact, samples.runs[0]))


def _draw_curves(what: str, samples: _Samples, plan: _Plan) -> None:
    if lengths := curve_lengths(samples.artifact.manifest.contract.context_length):
        samples.curve = plan.site.curves(what, samples.artifact, lengths, plan.spec.curve_seconds)


def _read_counters(what: str, samples: _Samples, plan: _Plan) -> None:
    spec = plan.spec
    samples.energy = plan.site.energy(what, samples.artifact, plan.lengths[-1], spec.decode_tokens, spec.energy_seconds)


def _sustain(what: str, samples: _Samples, plan: _Plan) -> None:
    samples.sustained = plan.site.sustained(what, samples.artifact, 60 * plan.spec.sustained_minutes)


# --- figures ----------------------------------------------------------------------------------------------------------


def of_runs(key: str, samples: Iterable[float | None], source: str = _CLOCK, reason: str = _NO_TEXT) -> Figure:
    """The median of one sample a process, with its interval; null where one has none."""
    found = list(samples)
    known = [sample for sample in found if sample is not None]
    if not known or len(known) < len(found):
        return unknown(key, reason)
    return figure(key, median(known), source, known, bootstrap_median(known))


@dataclass(frozen=True)
class _Summary:
    """An artifact's samples on their way to figures."""

    samples: _Samples
    plan: _Plan
    bandwidth: Sequence[float]

    def of(self, host: Host) -> Benchmark:
        """The benchmark."""
        figures = self._requests() | self._decoding() | self._cold() | self._curves() | self._memory()
        figures |= energies(self.samples.energy) | {"sustained": self.samples.sustained}
        return Benchmark.model_validate(
            {"settings": self._settings(), "machine": host, "noise": worst(self.samples.noises)} | figures
        )

    def _settings(self) -> BenchSettings:
        spec, site, longest = self.plan.spec, self.plan.site, self.plan.lengths[-1]
        return BenchSettings(
            ttft_from="text",
            threads=site.threads,
            prompt_tokens=self.plan.lengths,
            decode_tokens=spec.decode_tokens,
            decode_after_tokens=longest,
            cold_tokens=self.plan.lengths[0],
            context_length=self.samples.artifact.manifest.contract.context_length,
            runs=spec.runs,
            warm_up=f"{longest} tokens prefilled and {WARM_UP_TOKENS} decoded in every run, not counted",
            bandwidth_buffer_bytes=site.buffer_bytes,
            torch_in_process=any(run.torch_in_process for run in self.samples.runs),
            profile=site.limits.device if site.limits else None,
            limits=site.limits.sentences() if site.limits else [],
        )

    def _requests(self) -> dict[str, object]:
        """What depends on the prompt's length."""
        runs = self.samples.runs
        of = {n: [run.warm[n] for run in runs] for n in self.plan.lengths}
        return {
            "load_s": of_runs("load_s", [run.load_s for run in runs]),
            "first_ttft_s": of_runs("first_ttft_s", [run.first.ttft_s for run in runs]),
            "tokenize_s": {str(n): of_runs("tokenize_s", [r.tokenize_s for r in of[n]]) for n in of},
            "ttft_s": {str(n): of_runs("ttft_s", [r.ttft_s for r in of[n]]) for n in of},
            "first_token_s": {str(n): of_runs("first_token_s", [r.first_token_s for r in of[n]]) for n in of},
            "prefill_tokens_per_s": {
                str(n): of_runs("prefill_tokens_per_s", [tokens_per_s(n, r.prefill_s) for r in of[n]]) for n in of
            },
        }

    def _decoding(self) -> dict[str, Figure]:
        decodes = [run.decode for run in self.samples.runs]
        rates = [tokens_per_s(r.decode_tokens, r.decode_s) for r in decodes]
        gaps = [gap for r in decodes for gap in r.icl_s]
        read = traffic_of(self.samples.artifact).bytes_per_token(
            self.plan.lengths[-1] + self.plan.spec.decode_tokens / 2
        )

        def icl(q: int) -> Figure:
            key, each = f"icl_p{q}_s", [percentile(r.icl_s, q) for r in decodes if r.icl_s]
            return figure(key, percentile(gaps, q), _CLOCK, each) if gaps else unknown(key, _NO_TEXT)

        return {
            "decode_tokens_per_s": of_runs("decode_tokens_per_s", rates),
            "itl_s": of_runs("itl_s", [r.itl_s for r in decodes]),
            "icl_s": figure("icl_s", median(gaps), _CLOCK, gaps) if gaps else unknown("icl_s", _NO_TEXT),
            **{f"icl_p{q}_s": icl(q) for q in (50, 95, 99)},
            "sampling_s": of_runs("sampling_s", [s for r in decodes for s in r.sampling_s]),
            "bytes_per_token": figure("bytes_per_token", read, "computed:manifest"),
            **_roofline(rates, read, self.bandwidth),
        }

    def _cold(self) -> dict[str, Figure]:
        cold, none = self.samples.cold, "no cold start was asked for"
        return {
            "cold_ttft_s": of_runs("cold_ttft_s", [c.ttft_s for c in cold], reason=_NO_TEXT if cold else none),
            "cold_major_faults": of_runs(
                "cold_major_faults", [c.major_faults for c in cold], "measured:getrusage", none
            ),
            "cold_read_bytes": of_runs("cold_read_bytes", [c.read_bytes for c in cold], "measured:proc-io", none),
        }

    def _curves(self) -> dict[str, object]:
        lengths = curve_lengths(self.samples.artifact.manifest.contract.context_length)
        points = self.samples.curve
        if not self.plan.spec.curve_seconds:
            return {}
        late = f"bench.curve_seconds {self.plan.spec.curve_seconds:g} were used up"

        def curve(key: str, attribute: str) -> dict[str, Figure]:
            return {
                str(n): of_runs(key, [getattr(points[n], attribute)]) if n in points else unknown(key, late)
                for n in lengths
            }

        return {
            "ttft_curve_s": curve("ttft_curve_s", "ttft_s"),
            "decode_curve_tokens_per_s": curve("decode_curve_tokens_per_s", "decode_tokens_per_s"),
        }

    def _memory(self) -> dict[str, object]:
        runs, manifest = self.samples.runs, self.samples.artifact.manifest
        each = manifest.traffic.kv_bytes_per_position if manifest.traffic else None

        def cache(key: str, positions: int) -> Figure:
            if each is None:
                return unknown(key, "the exporter did not say")
            return figure(key, each * positions, "computed:manifest")

        return {
            "memory": {
                name: _phase([run.memory[name] for run in runs], [run.vram[name] for run in runs])
                for name in runs[0].memory
            },
            "peak_rss_bytes": of_runs("peak_rss_bytes", [run.peak_rss for run in runs], "measured:peak-rss"),
            "rss_before_load_bytes": of_runs(
                "rss_before_load_bytes", [run.rss_before_load for run in runs], "measured:psutil"
            ),
            "kv_cache_bytes": cache("kv_cache_bytes", manifest.contract.context_length),
            "kv_bytes_per_1000_tokens": cache("kv_bytes_per_1000_tokens", 1000),
        }


def energies(run: EnergyRun | str) -> dict[str, Energy]:
    """Joules of a token in each phase and of a request, net of idling."""
    keys = ("prefill_energy_j_per_token", "decode_energy_j_per_token", "request_energy_j")
    if isinstance(run, str):
        return {key: Energy(value=None, unit=METRICS[key].unit, reason=run) for key in keys}
    windows = dict(zip(keys, (run.prefill, run.decode, run.requests), strict=True))
    return {key: _energy(key, run, window) for key, window in windows.items()}


def _energy(key: str, run: EnergyRun, window: Window) -> Energy:
    """A window's energy; null where its counter, or an idle one's, moved too seldom."""
    unit = METRICS[key].unit
    if why := next(filter(None, map(refusal, (window, *run.idle))), None):
        return Energy(value=None, unit=unit, reason=why, counters=run.counters)
    net, gross = run.per_token(window)
    ratio, remarks = None, list[str]()
    if key.startswith("decode") and net > 0 and not refusal(run.requests) and not refusal(run.prefill):
        ratio = run.decode_by_differences() / net
        if abs(ratio - 1) > APART:
            remarks.append(f"whole requests less their prompts give {ratio:.2f} times as much")
    return Energy(
        value=net,
        unit=unit,
        source=f"measured:{'+'.join(run.counters)}",
        gross=gross,
        counters=run.counters,
        idle_w=run.idle_w,
        window_s=window.seconds,
        counter_updates=window.updates,
        granularity_j=window.granularity,
        differences_ratio=ratio,
        remarks=remarks,
    )


def _roofline(rates: Sequence[float], read: float, bandwidth: Sequence[float]) -> dict[str, Figure]:
    """The bandwidth, and the share of the memory's roofline; above 1 it is no roofline, and none is given."""
    if not bandwidth:
        return {key: unknown(key, _NO_BANDWIDTH) for key in ("bandwidth_bytes_per_s", "decode_roofline_fraction")}
    fastest = max(bandwidth)
    fractions = [decode_roofline_fraction(rate, read, fastest) for rate in rates]
    if (middle := median(fractions)) <= 1:
        share = of_runs("decode_roofline_fraction", fractions)
    else:
        cache = last_level_cache_bytes()
        why = "what a token reads fits the cache" if cache and read < cache else "the bandwidth was measured too low"
        share = unknown("decode_roofline_fraction", f"wrong roofline: {middle:.0%} of it were reached; {why}")
    return {
        "bandwidth_bytes_per_s": figure("bandwidth_bytes_per_s", fastest, "measured:memchr", bandwidth),
        "decode_roofline_fraction": share,
    }


def _phase(phases: Sequence[Phase | None], vram: Sequence[int]) -> PhaseMemory:
    """Medians of a phase over the runs."""
    known = [phase for phase in phases if phase]
    values = {
        "peak_rss_bytes": [phase.peak_rss for phase in known],
        "anonymous_bytes": [phase.end.anonymous for phase in known],
        "file_backed_bytes": [phase.end.file_backed for phase in known],
        "swap_bytes": [phase.end.swap for phase in known],
        "pss_bytes": [phase.end.pss for phase in known],
    }
    sources = {key: "measured:VmHWM" if key == "peak_rss_bytes" else "measured:smaps_rollup" for key in values}
    made = {key: of_runs(key, found, sources[key], NOT_LINUX) for key, found in values.items()}
    of_gpus = [held or None for held in vram]
    return PhaseMemory(**made, vram_bytes=of_runs("vram_bytes", of_gpus, "measured:nvml", "NVML tells of none"))


def worst(noises: Sequence[Noise]) -> Noise:
    """Of several measurements, the greatest of everything."""
    told: dict[str, object] = {}
    for key in ("steal_share", "others_cpu_share", "cpu_pressure_share", "memory_pressure_share"):
        told[key] = max((x for n in noises if (x := getattr(n, key)) is not None), default=None)
    for key in ("frequency_mhz", "temperature_c"):
        spans = [span for n in noises if (span := getattr(n, key))]
        told[key] = [min(s[0] for s in spans), max(s[1] for s in spans)] if spans else None
    switches = [n.involuntary_switches_per_s for n in noises if n.involuntary_switches_per_s is not None]
    throttled = [n.throttled for n in noises if n.throttled is not None]
    return Noise.model_validate(
        told
        | {
            "involuntary_switches_per_s": max(switches, default=None),
            "throttled": sum(throttled) if throttled else None,
            "repeated": any(n.repeated for n in noises),
            "dirty": list(dict.fromkeys(words for n in noises for words in n.dirty)),
        }
    )


def traffic_of(artifact: Artifact) -> Traffic:
    """What the exporter said; where it said nothing, all weights and no cache."""
    manifest = artifact.manifest
    weight_bytes = round(manifest.parameters * manifest.bits_per_weight / 8)
    return manifest.traffic or Traffic(weight_bytes=weight_bytes, kv_bytes_per_position=0)

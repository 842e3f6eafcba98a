"""What is proved of a model or an artifact: every figure typed, and the one table that says what each of them is.

A figure that is not known is null and says why; it is never zero. What stands in manifests, ledgers and ``--json`` are
these models as JSON; those that an earlier version wrote are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from . import formats as show
from .formats import NOT_MEASURED

Source = Annotated[str, Field(pattern=r"^(measured|computed|estimated|predicted):.")]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
"""Low and high of a 95 % interval."""


class _Proof(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


# --- one figure -------------------------------------------------------------------------------------------------------


class Figure(_Proof):
    """A number, where it comes from, and the raw samples it was made of; or the reason why there is none."""

    value: float | None
    unit: str | None = None
    """None: written before units were."""
    source: Source | None = None
    samples: list[float] = []
    reason: str | None = None
    """Why the value is null."""
    ci95: Interval | None = None
    """Of the value, by bootstrap over the samples."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_unknown(cls, given: object) -> object:
        """Earlier versions wrote null in place of a figure."""
        return {"value": None, "reason": NOT_MEASURED} if given is None else given

    @model_validator(mode="after")
    def _is_known_or_says_why_not(self) -> Self:
        if self.value is None and not self.reason:
            raise ValueError("a figure that is null has a reason")
        if self.value is not None and not self.source:
            raise ValueError("a figure has a source")
        return self


class Energy(Figure):
    """Joules, net of what the machine draws when idle; the value is null where no counter told.

    An estimate from a device's watts never stands here.
    """

    gross: float | None = None
    """The same with the idle power in it."""
    counters: list[str] = []
    """What was read, such as ``package-0`` and ``dram``."""
    idle_w: list[float] = []
    """Before and after."""
    window_s: float | None = None
    counter_updates: int | None = None
    """How often the counter moved within the window."""
    granularity_j: float | None = None
    """The least step that the counter was seen to make."""
    differences_ratio: float | None = None
    """The same from windows of both phases less windows of one, over the value: 1 where they agree."""
    remarks: list[str] = []


def figure(
    key: str, value: float, source: str, samples: Sequence[float] = (), ci95: Sequence[float] | None = None
) -> Figure:
    """A figure of the table below."""
    interval = None if ci95 is None else list(ci95)
    return Figure(value=value, unit=METRICS[key].unit, source=source, samples=list(samples), ci95=interval)


def unknown(key: str, reason: str) -> Figure:
    """The figure of the table below that could not be had."""
    return Figure(value=None, unit=METRICS[key].unit, reason=reason)


_UNKNOWN = Figure(value=None, reason=NOT_MEASURED)
_NO_COUNTER = Energy(value=None, reason="no energy counter was read")


# --- an artifact against its reference --------------------------------------------------------------------------------


class Position(_Proof):
    """A place in the held-out windows."""

    window: int
    token: int


class Comparison(_Proof):
    """How far one model's logits are from another's: KL(reference || other) in nats per token."""

    windows: int
    window_tokens: int
    unusable_positions: int
    """Where the logits are not numbers, or give a KL without bound; the means leave them out."""
    kl_mean: float | None = None
    kl_mean_ci95: Interval | None = None
    kl_p50: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    kl_max_at: Position | None = None
    perplexity_reference: float | None = None
    perplexity_artifact: float | None = None
    perplexity_artifact_ci95: Interval | None = None
    perplexity_ratio: float | None = None
    top1_agreement: Share | None = None
    top1_agreement_ci95: Interval | None = None
    logit_max_abs_difference: float | None = None
    logit_mean_abs_difference: float | None = None
    source: Source = "measured:logits"
    samples: dict[str, list[float]] = {}
    """Of each window, by the figure that is made of them."""
    reasons: dict[str, str] = {}
    """Why a figure is null."""

    def figure(self, key: str) -> Figure:
        """One of the numbers above with all that is known of it."""
        value, unit = getattr(self, key), METRICS[key].unit
        if value is None:
            return Figure(value=None, unit=unit, reason=self.reasons.get(key, NOT_MEASURED))
        return Figure(value=value, unit=unit, source=self.source, samples=self.samples.get(key, []))


class QuantizedComparison(Comparison):
    """A quantized student against the student."""

    recipe: str
    method: str
    bits_per_weight: float


TextKind = Literal["string", "chat", "round trip"]
Read = list[int] | str
"""Ids; of a round trip a text; or a complaint."""


class TokenDifference(_Proof):
    """A text that the runtime reads otherwise than the reference tokenizer."""

    kind: TextKind
    text: str
    expected: Read
    runtime: Read


class TokenCheck(_Proof):
    """The runtime's tokenizer against the reference's."""

    differences: list[TokenDifference] = []
    """The first few."""
    strings: int
    strings_identical: int
    chats: int
    chats_identical: int
    chats_refused: int | None = None
    """By both; not among ``chats``."""
    round_trips: int
    round_trips_identical: int


class ChunkedPrefill(_Proof):
    """A prompt fed in pieces against token by token."""

    max_abs_difference: float | None
    argmax_equal: Share
    kl_mean: float | None = None
    """KL(token by token || in pieces), nats per token; null where logits are not usable, or written before it was."""
    kl_to_reference: float | None = None
    """KL(reference || in pieces)."""
    kl_to_reference_token_by_token: float | None = None
    """KL(reference || token by token)."""
    kl_to_reference_change_error: float | None = None
    """Standard error, over the positions, of what the two have between them."""


class GoldenAnswer(_Proof):
    """What the artifact's own runtime went on with, token by token, until two were nearly as likely."""

    prompt_ids: list[int]
    tokens: list[int]
    """None where the ids alone are compared."""
    text: str | None = None
    """What the ids are of; null: of no text."""
    messages: list[dict[str, str]] | None = None
    """The chat that the contract's template renders as the text; null: the text is gone on with."""


SOFTWARE_GPU = "a software GPU: correctness only"
"""What a stand-in is where the CPU does a GPU's work."""


class Parity(Comparison):
    """An artifact, run by its runtime, against the student."""

    greedy_tokens: int | None = None
    greedy_prompts: int | None = None
    first_diverging_token: int | None = None
    """Null where none differs."""
    first_diverging_token_by_prompt: list[int | None] = []
    chunked_prefill: dict[str, ChunkedPrefill] = {}
    """By the size of the pieces, ``all`` for one."""
    stand_in: str | None = None
    """What ran the artifact where its own runtime cannot."""
    tokens: TokenCheck | None = None
    golden: list[GoldenAnswer] = []
    """For the self-test of apps."""
    runtime: Comparison | None = None
    """Against the quantized student it was packed from: what the runtime alone costs."""
    arithmetic_kl_mean: float | None = None
    """What rounding as the runtime does costs the model it should compute, on the first windows; null: not known."""
    runtime_kl_mean: float | None = None
    """KL to the model it should compute, on the same windows; null: the runtime's own quantizer made it."""
    failures: list[str] | None = None
    """What missed its gate, a sentence each; None: not judged."""


# --- an artifact against the clock ------------------------------------------------------------------------------------


class BenchSettings(_Proof):
    """What was run."""

    ttft_from: Literal["ids", "text"] = "ids"
    """Where TTFT begins; what earlier versions wrote, which lacks this key, began at the ids."""
    threads: int | None = None
    prompt_tokens: list[int] = []
    decode_tokens: int | None = None
    decode_after_tokens: int | None = None
    cold_tokens: int | None = None
    """Length of the prompt of cold and first requests."""
    context_length: int | None = None
    runs: int | None = None
    warm_up: str | None = None
    bandwidth_buffer_bytes: int | None = None
    torch_in_process: bool | None = None
    profile: str | None = None
    """The device whose limits the run was held to."""
    limits: list[str] = []
    """Those limits, a sentence each."""


class Host(_Proof):
    """The machine or device that figures belong to, and how busy it was."""

    device: str | None = None
    """As its makers call it, where it is more than a CPU: a phone, a board."""
    cpu: str | None = None
    cores: int | None = None
    logical_cores: int | None = None
    gpu: str | None = None
    last_level_cache_bytes: int | None = None
    ram_bytes: int | None = None
    os: str | None = None
    architecture: str | None = None
    python: str | None = None
    runtime_build: str | None = None
    """Version of the runtime, and the instructions that it was built for."""
    load_average_1min: float | None = None


class Noise(_Proof):
    """What else the machine did while it was measured; null where the system does not tell."""

    steal_share: Share | None = None
    """Of the CPUs' time that a virtual machine was not given."""
    others_cpu_share: float | None = None
    """Of one core, that other processes took."""
    cpu_pressure_share: float | None = None
    """Of the time in which some task waited for a CPU (PSI)."""
    memory_pressure_share: float | None = None
    involuntary_switches_per_s: float | None = None
    frequency_mhz: Interval | None = None
    """Least and greatest of all cores, before and after."""
    throttled: int | None = None
    """Times that the CPU slowed itself for its heat."""
    temperature_c: Interval | None = None
    """Before and after."""
    repeated: bool = False
    """The first attempt was disturbed and was measured again."""
    dirty: list[str] = []
    """Why these figures were disturbed, a sentence each."""


class PhaseMemory(_Proof):
    """Memory of the process in one phase: its peak since the phase began, and what it held at its end."""

    peak_rss_bytes: Figure = _UNKNOWN
    anonymous_bytes: Figure = _UNKNOWN
    """What a phone counts against an app: it cannot be dropped and read again."""
    file_backed_bytes: Figure = _UNKNOWN
    swap_bytes: Figure = _UNKNOWN
    pss_bytes: Figure = _UNKNOWN
    vram_bytes: Figure = _UNKNOWN


class Slice(_Proof):
    """A part of a sustained run."""

    seconds: float
    decode_tokens_per_s: float
    temperature_c: float | None = None


class Sustained(_Proof):
    """Decoding without a pause, slice by slice."""

    slices: list[Slice]
    change_slice: int | None = None
    """The slice, counted from 0, from which on it was slower; null: none."""
    factor: float | None = None
    """Speed behind the change over speed before it; 1 where there is none."""


def _renamed(given: object, names: Mapping[str, str]) -> object:
    """Keys of an earlier version by their names of today."""
    return {names.get(key, key): value for key, value in given.items()} if isinstance(given, dict) else given


_EARLIER_NAMES = {
    "inter_token_s": "icl_s",
    "inter_token_p50_s": "icl_p50_s",
    "inter_token_p95_s": "icl_p95_s",
}


class Benchmark(_Proof):
    """Medians over fresh processes; what depends on the prompt stands by its length in tokens.

    Every term is defined in ``benchmarks/definitions.py``. A program that measures elsewhere, such as an app on a
    phone, writes this model as JSON and leaves out what it does not know.
    """

    settings: BenchSettings = BenchSettings()
    machine: Host = Host()
    noise: Noise = Noise()
    load_s: Figure = _UNKNOWN
    tokenize_s: dict[str, Figure] = {}
    ttft_s: dict[str, Figure] = {}
    first_token_s: dict[str, Figure] = {}
    prefill_tokens_per_s: dict[str, Figure] = {}
    decode_tokens_per_s: Figure = _UNKNOWN
    itl_s: Figure = _UNKNOWN
    icl_s: Figure = _UNKNOWN
    icl_p50_s: Figure = _UNKNOWN
    icl_p95_s: Figure = _UNKNOWN
    icl_p99_s: Figure = _UNKNOWN
    sampling_s: Figure = _UNKNOWN
    cold_ttft_s: Figure = _UNKNOWN
    """From the start of the process, its files dropped from the page cache."""
    cold_major_faults: Figure = _UNKNOWN
    cold_read_bytes: Figure = _UNKNOWN
    """From the disk, until the first text."""
    first_ttft_s: Figure = _UNKNOWN
    """Of the first request of a process."""
    ttft_curve_s: dict[str, Figure] = {}
    decode_curve_tokens_per_s: dict[str, Figure] = {}
    """Behind a prompt of each length up to the whole context; what was too long to measure is null."""
    memory: dict[Literal["load", "prefill", "decode"], PhaseMemory] = {}
    peak_rss_bytes: Figure = _UNKNOWN
    rss_before_load_bytes: Figure = _UNKNOWN
    kv_cache_bytes: Figure = _UNKNOWN
    """Of the whole context, in the type that the runtime keeps."""
    kv_bytes_per_1000_tokens: Figure = _UNKNOWN
    bandwidth_bytes_per_s: Figure = _UNKNOWN
    bytes_per_token: Figure = _UNKNOWN
    decode_roofline_fraction: Figure = _UNKNOWN
    prefill_energy_j_per_token: Energy = _NO_COUNTER
    decode_energy_j_per_token: Energy = _NO_COUNTER
    request_energy_j: Energy = _NO_COUNTER
    """Of the longest prompt and the decoded tokens behind it."""
    estimated_decode_energy_j_per_token: Figure = _UNKNOWN
    """From a device's published power, never from a counter."""
    sustained: Sustained | None = None

    @model_validator(mode="before")
    @classmethod
    def _reads_earlier_names(cls, given: object) -> object:
        return _renamed(given, _EARLIER_NAMES)


class BenchRecord(_Proof):
    """A benchmark with what it is of: a line of a history, and the file that an app on a device writes."""

    schema_version: Literal[1] = 1
    created: str
    """UTC, ISO 8601."""
    artifact: str
    """Name of the artifact's folder."""
    name: str
    target: str
    recipe: str
    runtime: str
    files_digest: str
    """Digest of the manifest's ``files``: the same files, the same digest."""
    size_bytes: int
    benchmark: Benchmark


class Audit(_Proof):
    """What an artifact did to a machine when it ran there: ``edgekd audit``."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["passed", "failed", "not checked"]
    failures: list[str]
    """What it must not do: sockets, files written and files read, by name."""
    not_checked: list[str]
    """What could not be checked there, and why."""
    opened: dict[str, int]
    """Number of files read, by whose they are: ``artifact``, ``interpreter``, ``system``, ``temporary``, ``other``."""
    opened_outside: list[str]
    """Those that are neither the artifact's nor the interpreter's; ``~``, ``TMPDIR`` and ``.`` were the run's own."""
    written: list[str]
    sockets: list[str]


# --- an artifact at tasks ---------------------------------------------------------------------------------------------


class TaskScore(_Proof):
    """One figure of a task, by lm-evaluation-harness, and the same of the reference: ``edgekd eval``."""

    model_config = ConfigDict(extra="forbid")

    task: str
    metric: str
    filter: str
    fewshot: int
    chat: bool
    """Its questions were put through the chat template."""
    higher_is_better: bool
    documents: int
    score: Figure
    """Its samples are those of the documents, in their order."""
    standard_error: float | None = None
    reference: Figure | None = None
    """Of the model that the artifact is held against; None: it was not asked."""
    reference_name: str | None = None
    retention: float | None = None
    """The score over the reference's, where more is better."""
    retention_ci95: Interval | None = None
    """By a bootstrap over the documents, both models' taken together."""

    @property
    def kept(self) -> str:
        """Share of the reference's score, with its interval, in words; empty where there is none."""
        if self.retention is None:
            return ""
        low, high = (show.percent(bound, 0) for bound in self.retention_ci95 or (None, None))
        return show.percent(self.retention) + (f" ({low} to {high})" if self.retention_ci95 else "")


# --- a model against held-out text ------------------------------------------------------------------------------------


class Evaluation(_Proof):
    """How well a model foresees held-out text. Losses and KL in nats per token."""

    loss: float
    perplexity: float
    next_token_accuracy: Share
    tokens: int
    kl_to_teacher: float | None = None
    top1_agreement_with_teacher: Share | None = None


class ModelQuality(Evaluation):
    """An evaluation, and the model's size."""

    parameters: int
    by_source: dict[str, Evaluation] = {}
    """On the text of each source of a mixture alone, by its name."""


class Quality(_Proof):
    """What was trained with one seed, beside the teacher where that was measured."""

    teacher: ModelQuality | None = None
    student: ModelQuality | None = None
    baseline: ModelQuality | None = None
    """Trained on labels alone."""

    def models(self) -> dict[str, ModelQuality]:
        """Those that were measured, by their name."""
        named = (("teacher", self.teacher), ("student", self.student), ("baseline", self.baseline))
        return {name: model for name, model in named if model}


class SeedQuality(Quality):
    """The same, of one of several seeds."""

    seed: int


class Hop(_Proof):
    """A row of the ledger: KL(start || end) in nats per token."""

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    start: str = Field(alias="from")
    end: str = Field(alias="to")
    bits_per_weight: float | None = None
    """Of what stands at the end."""
    kl_mean: float | None = None
    kl_ci95: Interval | None = None
    top1: Share | None = None
    top1_ci95: Interval | None = None
    perplexity_from: float | None = None
    perplexity_to: float | None = None
    perplexity_to_ci95: Interval | None = None


# --- the table --------------------------------------------------------------------------------------------------------

_UNITS_IN_THE_TEXT = ("bytes", "s", "share")


@dataclass(frozen=True)
class Metric:
    """What a figure is, for the console, the report, gates and whatever compares two runs."""

    key: str
    title: str
    unit: str
    """As it is stored; empty for a plain number."""
    text: show.Format
    """The value as people read it; sizes, times and shares with their unit."""
    better: Literal["lower", "higher"] | None = None
    gate: str | None = None
    """The threshold of a gate on it: a key of ``spec.Thresholds``."""

    def label(self, prompt_tokens: str = "") -> str:
        """Title, length of the prompt if the figure depends on it, and the unit that the text lacks."""
        length = f" at {prompt_tokens} tokens" if prompt_tokens else ""
        unit = f", {self.unit}" if self.unit and self.unit not in _UNITS_IN_THE_TEXT else ""
        return f"{self.title}{length}{unit}"


def _digits(count: int) -> show.Format:
    return partial(show.significant, digits=count)


_SHARE_2 = partial(show.percent, decimals=2)

METRICS = {
    metric.key: metric
    for metric in (
        # a model
        Metric("parameters", "Parameters", "", show.parameters, "lower"),
        Metric("next_token_accuracy", "Next-token accuracy", "share", show.percent, "higher"),
        Metric("perplexity", "Perplexity", "", _digits(4), "lower"),
        Metric("kl_to_teacher", "KL to the teacher", "nats", show.significant, "lower"),
        Metric("top1_agreement_with_teacher", "Same top token as the teacher", "share", show.percent, "higher"),
        Metric("tokens", "Test tokens", "", show.count),
        # a hop of the ledger, and an artifact's parity
        Metric("kl_mean", "KL mean", "nats", show.significant, "lower", "kl_mean_max"),
        Metric("kl_p99", "KL p99", "nats", show.significant, "lower", "kl_p99_max"),
        Metric("top1_agreement", "Same top token", "share", _SHARE_2, "higher", "top1_min"),
        Metric("top1", "Same top token", "share", _SHARE_2, "higher"),
        Metric("perplexity_artifact", "Perplexity", "", _digits(4), "lower"),
        Metric("perplexity_ratio", "Perplexity ratio", "", _digits(5), "lower", "perplexity_ratio_max"),
        Metric("perplexity_from", "Perplexity before", "", _digits(5), "lower"),
        Metric("perplexity_to", "after", "", _digits(5), "lower"),
        # an artifact's size
        Metric("size_bytes", "On disk", "bytes", show.size, "lower"),
        Metric("bits_per_weight", "Bits per weight", "", show.significant, "lower"),
        # its benchmark
        Metric("load_s", "Load", "s", show.duration, "lower"),
        Metric("tokenize_s", "Tokenize", "s", show.duration, "lower"),
        Metric("ttft_s", "TTFT", "s", show.duration, "lower"),
        Metric("prefill_tokens_per_s", "Prefill", "tok/s", show.significant, "higher"),
        Metric("decode_tokens_per_s", "Decode", "tok/s", show.significant, "higher"),
        Metric("first_token_s", "First token, from ids", "s", show.duration, "lower"),
        Metric("itl_s", "ITL", "s", show.duration, "lower"),
        Metric("icl_s", "ICL", "s", show.duration, "lower"),
        Metric("icl_p50_s", "ICL p50", "s", show.duration, "lower"),
        Metric("icl_p95_s", "ICL p95", "s", show.duration, "lower"),
        Metric("icl_p99_s", "ICL p99", "s", show.duration, "lower"),
        Metric("cold_ttft_s", "TTFT, cold", "s", show.duration, "lower"),
        Metric("cold_major_faults", "Major faults, cold", "", show.count, "lower"),
        Metric("cold_read_bytes", "Read from disk, cold", "bytes", show.size, "lower"),
        Metric("first_ttft_s", "TTFT, first request", "s", show.duration, "lower"),
        Metric("ttft_curve_s", "TTFT", "s", show.duration, "lower"),
        Metric("decode_curve_tokens_per_s", "Decode", "tok/s", show.significant, "higher"),
        Metric("sampling_s", "Sampling", "s", show.duration, "lower"),
        Metric("decode_roofline_fraction", "Decode of roofline", "share", partial(show.percent, decimals=0), "higher"),
        Metric("peak_rss_bytes", "Peak RSS", "bytes", show.size, "lower"),
        Metric("rss_before_load_bytes", "RSS before load", "bytes", show.size),
        Metric("bandwidth_bytes_per_s", "Read bandwidth", "bytes/s", show.significant),
        Metric("bytes_per_token", "Read per token", "bytes", show.size, "lower"),
        Metric("anonymous_bytes", "Anonymous", "bytes", show.size, "lower"),
        Metric("file_backed_bytes", "File-backed", "bytes", show.size, "lower"),
        Metric("swap_bytes", "Swap", "bytes", show.size, "lower"),
        Metric("pss_bytes", "PSS", "bytes", show.size, "lower"),
        Metric("vram_bytes", "VRAM", "bytes", show.size, "lower"),
        Metric("kv_cache_bytes", "Cache of the whole context", "bytes", show.size, "lower"),
        Metric("kv_bytes_per_1000_tokens", "Cache of 1,000 tokens", "bytes", show.size, "lower"),
        Metric("prefill_energy_j_per_token", "Energy, prefill", "J per token", show.significant, "lower"),
        Metric("decode_energy_j_per_token", "Energy, decode", "J per token", show.significant, "lower"),
        Metric("request_energy_j", "Energy of a request", "J", show.significant, "lower"),
        Metric("estimated_decode_energy_j_per_token", "Estimated, decode", "J per token", show.significant, "lower"),
    )
}

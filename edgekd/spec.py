"""The spec: one strict YAML file that says everything a run does.

Every model here refuses unknown keys, and every number has bounds: what lies beyond them is a slip of the finger, and
would end hours later in a shape that no machine holds or in a loss that is not a number. ``load_spec`` turns each of
pydantic's complaints into one sentence that names the file, the key, and the nearest valid one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from glob import iglob
from importlib import resources
from itertools import islice
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from .errors import SpecError
from .strict_yaml import read_yaml

CUT_TOKENS = 512
"""Of text, on which it is chosen what a cut student keeps."""
MAX_SEED = 2**32 - 1  # numpy's generators take no larger one
_MAX_FILES = 100_000
_MAX_SHOWN = 200
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}

Count = Annotated[int, Field(gt=0, lt=2**31)]
Few = Annotated[int, Field(gt=0, le=2**12)]
Width = Annotated[int, Field(gt=0, le=2**20)]
Length = Annotated[int, Field(gt=0, le=2**24)]
Share = Annotated[float, Field(gt=0, lt=1)]
Ceiling = Annotated[float, Field(ge=0, le=1e6)]
LossWeight = Annotated[float, Field(ge=1e-6, le=1e6)]
Name = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
_SOME_TARGETS = Field(min_length=1, max_length=100)
DEFAULT_CONTEXT = 4096
"""Most tokens of an artifact's context where the spec names none: several runtimes hold a cache of the whole context
from the start, and a student's own may be 32,768."""
M = TypeVar("M", bound=BaseModel)
LossName = Literal[
    "forward_kl", "reverse_kl", "skewed_kl", "skewed_reverse_kl", "jsd", "total_variation", "cross_entropy"
]
MatchName = Literal["hidden", "attention"]
TeacherWeights = Literal["float32", "bfloat16", "int4"]
LayerNumber = Annotated[int, Field(ge=0, lt=2**12)]
OF_TEACHER = ("loss", "temperature", "jsd_beta", "skew", "on_policy", "match")
"""Keys of a training that say nothing where there is no teacher."""
OF_PART: frozenset[LossName] = frozenset({"cross_entropy", "forward_kl", "skewed_kl"})
"""Losses that are a mean over the teacher's distribution, or need none: what a cached teacher tells is enough."""
Method = Literal["rtn", "search", "gptq", "qad"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


SourceName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]
Weight = Annotated[float, Field(ge=1e-3, le=1e3)]
Amount = Annotated[str, Field(pattern=r"^[0-9]{1,4}(\.[0-9]{1,3})?[kMB]$")]
_SCALES = {"k": 10**3, "M": 10**6, "B": 10**9}


class OneTeacher(_Strict):
    """A model that is imitated, alone or beside others."""

    model: Name = Field(
        description='A folder, "builtin:pycode-16m", or "hub:organisation/name" (downloads; "@revision" pins).'
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with a hub model. Read it first.")
    weight: Weight = Field(1.0, description="Of its distribution in the mean of all who teach the same text.")
    sources: list[SourceName] = Field([], description="Of data.sources, those that it teaches. Default: all.")


class ServedSpec(_Strict):
    """A server that runs the teacher. The text of the training is sent there."""

    url: Annotated[str, Field(max_length=4096, pattern=r"^https?://[A-Za-z0-9.:\[\]_-]+(/[^\s?#]*)?$")] = Field(
        description="Of an OpenAI-compatible interface, such as http://127.0.0.1:8000/v1."
    )
    top_logprobs: Annotated[int, Field(gt=0, le=1000)] = Field(
        20, description="Likeliest tokens that it tells of each place: 20 is what vLLM gives unless told otherwise."
    )
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")] | None = Field(
        None, description="The environment variable that holds the key which the server asks for."
    )
    timeout_s: Annotated[float, Field(gt=0, le=86400)] = Field(300, description="Longest wait for one answer.")

    @field_validator("url")
    @classmethod
    def _has_host(cls, url: str) -> str:
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:  # a port that is none raises
            raise ValueError("it names no host, or no port")
        return url


class TeacherSpec(OneTeacher):
    """The model that is imitated."""

    alignment: Literal["ids", "text"] = Field(
        "ids",
        description="ids: the student has the teacher's tokenizer. text: a student that is a checkpoint has its own, "
        "and the teacher is heard through the text that both read.",
    )
    served: ServedSpec | None = Field(
        None, description="The server that runs it, where model is its name there; the student is a checkpoint."
    )

    more: Annotated[list[OneTeacher], Field(max_length=100)] = Field(
        [], description="Further teachers with the same tokenizer, each with the keys above."
    )
    weights: TeacherWeights = Field(
        "float32",
        description="As the student hears it; int4: the layers' matrices on edgekd's grid, rounded to nearest, and the "
        "rest in bfloat16. Quality is measured against the teacher in float32.",
    )
    signal: Literal["online", "cached"] = Field(
        "online",
        description="online: it runs beside the student. cached: it reads the windows of the training first, and what "
        "it says of them stays on disk, at most 112 bytes a token; for forward_kl, skewed_kl and cross_entropy.",
    )

    @property
    def each(self) -> Sequence[OneTeacher]:
        """Every teacher, the one whose tokenizer the student has first."""
        return [self, *self.more]

    @property
    def beside(self) -> TeacherWeights | None:
        """Its weights in memory while the student learns; None: there are none."""
        return self.weights if self.signal == "online" and not self.served else None

    def shares(self, source: str) -> list[float]:
        """What each teacher counts for in text of a source; together one, or nothing where nobody teaches it."""
        weights = [one.weight if not one.sources or source in one.sources else 0.0 for one in self.each]
        return [weight / (sum(weights) or 1.0) for weight in weights]


class FitsSpec(_Strict):
    """A device whose memory the student is to fit."""

    profile: Name = Field(description="A shipped profile such as iphone-15-pro, or a YAML file of one.")
    recipe: Name = Field("portable-int4", description="On the portable grid: how the weights are stored there.")
    context: Length | None = Field(
        None, description=f"Tokens that its cache holds; default: the teacher's context, {DEFAULT_CONTEXT} at most."
    )


class CutStudent(_Strict):
    """A student cut from the teacher."""

    init: Literal["cut"]
    layers: Few | None = Field(
        None, description="Layers to keep; or parameters and fits, which choose layers and widths."
    )
    # Not dumped: a run has the shape in their place, and its stages' keys are those of a spec that names it.
    parameters: Amount | None = Field(
        None, exclude=True, description="With fits: how many weights it is to have, such as 350M or 1.2B."
    )
    fits: FitsSpec | None = Field(None, exclude=True, description="With parameters: what it is to fit.")
    hidden_size: Width | None = Field(None, description="Channels to keep. Default: all.")
    intermediate_size: Width | None = Field(None, description="MLP units to keep per layer. Default: all.")
    choose: Literal["greedy", "even"] = Field(
        "greedy",
        description=f"greedy: on {CUT_TOKENS} tokens of the data, leave out layer by layer the one without which the "
        "outputs stay nearest to the teacher's; keep the channels and units of largest activations. even: evenly "
        "spaced layers, the first and the last among them; the channels and units of largest weights.",
    )

    @model_validator(mode="after")
    def _has_one_shape(self) -> Self:
        if (self.parameters is None) != (self.fits is None):
            raise ValueError("parameters and fits belong together; give both")
        if (self.layers is None) == (self.fits is None):
            raise ValueError("give layers, or parameters and fits in their place")
        if self.fits and (self.hidden_size or self.intermediate_size):
            raise ValueError("parameters and fits choose hidden_size and intermediate_size; leave those out")
        return self

    @property
    def depth(self) -> int:
        """Layers to keep, where they are known."""
        assert self.layers is not None
        return self.layers

    @property
    def wanted(self) -> int:
        """The number that ``parameters`` says."""
        assert self.parameters is not None
        return round(float(self.parameters[:-1]) * _SCALES[self.parameters[-1]])


class ConfigStudent(_Strict):
    """A fresh student with the teacher's tokenizer."""

    init: Literal["config"]
    architecture: Literal["llama", "qwen2", "qwen3"]
    hidden_size: Width
    intermediate_size: Width
    layers: Few
    heads: Few
    kv_heads: Few
    head_dim: Few | None = Field(None, description="Default: hidden_size / heads.")
    tie_embeddings: bool = True


class CheckpointStudent(_Strict):
    """A student that exists already."""

    init: Literal["checkpoint"]
    model: Name = Field(description='A folder or "hub:organisation/name".')


StudentSpec = Annotated[CutStudent | ConfigStudent | CheckpointStudent, Field(discriminator="init")]


class TextSource(_Strict):
    """Where text comes from."""

    source: Literal["stdlib", "mixed", "jsonl", "parquet", "text", "hub"] | None = Field(
        None,
        description="stdlib: the running interpreter's own modules. mixed: shipped chats and prose, and some of these.",
    )
    paths: list[Name] = Field([], description="Files, for jsonl, parquet and text. Globs are allowed.")
    name: Name | None = Field(None, description="Data set on the hub, for source hub (downloads).")
    column: Name = Field("text", description="The column that holds the text, or the chat (a list of role/content).")
    chat: bool = Field(
        False,
        description="The column is a chat: only the assistant's tokens are trained on. A column tools reaches the "
        "chat template too, for which it is 26 July 2024.",
    )
    include_tests: bool = Field(False, description="For stdlib: read the test suites too.")

    @model_validator(mode="after")
    def _has_input(self) -> Self:
        if self.source in ("jsonl", "parquet", "text") and not self.paths:
            raise ValueError(f"source {self.source} needs paths")
        if self.source == "hub" and not self.name:
            raise ValueError("source hub needs name")
        return self

    def files(self, base: Path) -> list[Path]:
        """The local files that ``paths`` names, once each and sorted within a pattern.

        Args:
            base: folder that relative paths start from.

        Raises:
            SpecError: a pattern meets no file, or far too many.
        """
        files: dict[Path, None] = {}
        for pattern in self.paths:
            matches = list(islice(iglob(str(base / pattern), recursive=True), _MAX_FILES + 1))
            if len(matches) > _MAX_FILES:
                raise SpecError(f"data.paths: {base / pattern}: more than {_MAX_FILES:,} files.", "Narrow the pattern.")
            found = [path for path in map(Path, sorted(matches)) if path.is_file()]
            if not found:
                raise SpecError(f"data.paths: {base / pattern}: no such file.", "Paths start from the spec's folder.")
            files |= dict.fromkeys(found)
        return list(files)


class MixedSource(TextSource):
    """One of several sources."""

    weight: Weight = Field(
        1.0, description="How much of the training is read from it, beside the others' weights; small sources repeat."
    )

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.source is None:
            raise ValueError("source is missing")
        return self


class DataSpec(TextSource):
    """The text that teacher and student read."""

    sources: Annotated[dict[SourceName, MixedSource], Field(max_length=255)] = Field(
        {}, description="Instead of source: several, by names of yours, each with the keys above and a weight."
    )
    allow_skipped: bool = Field(
        False, description="Go on when more than 5 % of the rows are unusable; option --allow-skipped sets it."
    )
    context: Length = Field(512, description="Tokens of a training window.")
    isolate: bool = Field(True, description="Documents that share a window do not see each other.")
    processes: Few | None = Field(
        None, description="That tokenize; they change nothing but the time. Default: one for each core of much text."
    )
    validation_share: Share = Field(0.05, description="Share of documents held out for validation (not for stdlib).")
    test_share: Share = Field(0.05, description="Share of documents held out for the test (not for stdlib).")
    max_test_tokens: Count = Field(2**16, description="Most held-out tokens that quality is measured on.")

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if (self.source is None) == (not self.sources):
            raise ValueError("give source, or several under sources")
        if self.sources and (of_one := self.model_fields_set & set(TextSource.model_fields)):
            raise ValueError(f"{min(of_one)} stands beside sources; write it into the source that it is of")
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on")
        return self

    @property
    def each(self) -> Mapping[str, TextSource]:
        """Every source by its name; one alone is named by its kind."""
        return self.sources or {str(self.source): self}

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each source in a mixture; empty for one alone."""
        return {name: source.weight for name, source in self.sources.items()}


class TrainingSpec(_Strict):
    """What the training loop reads."""

    loss: dict[LossName, LossWeight] = Field(
        {"forward_kl": 0.9, "cross_entropy": 0.1}, description="Weight of each loss; their sum is minimised."
    )
    temperature: Annotated[float, Field(ge=0.01, le=1000)] = Field(1.0, description="Softens both distributions.")
    jsd_beta: Share = Field(0.5, description="Mixing weight of the teacher in the generalised JSD.")
    skew: Share = Field(0.1, description="Share of the other distribution that the skewed divergences mix in.")
    steps: Count = 1000
    batch_size: Width = Field(8, description="Windows of one forward pass.")
    gradient_accumulation: Width = 1
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 20
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where it is clearly faster, timed on this machine when training begins."
    )
    validate_every: Count = Field(100, description="Steps between validations.")
    checkpoint_every: Count = Field(100, description="Steps between checkpoints; a killed run goes on from the last.")
    patience: Count | None = Field(None, description="Stop after this many validations without a better one.")

    @property
    def windows_a_step(self) -> int:
        """Windows that one step of the optimizer reads."""
        return self.batch_size * self.gradient_accumulation

    def outcome(self, *exclude: str) -> dict[str, object]:
        """The settings that decide what comes out: not those that spread the same work over memory and time."""
        spread = ("batch_size", "gradient_accumulation", "checkpoint_every", "baseline")
        return {**self.model_dump(exclude={*spread, *exclude}), "windows_a_step": self.windows_a_step}

    @model_validator(mode="after")
    def _has_loss(self) -> Self:
        if not self.loss:
            raise ValueError(f"loss needs at least one of {', '.join(get_args(LossName))}")
        return self


class OnPolicySpec(_Strict):
    """Text that the student writes, and the teacher judges."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="Share of the steps that read such text.")
    loss: dict[LossName, LossWeight] = Field(
        {"reverse_kl": 1.0}, description="Weight of each loss there, over what the student wrote."
    )
    prompt_tokens: Length | None = Field(
        None,
        description="Tokens of a window before what the student writes; in a chat it begins where the next answer "
        "does. Default: half of data.context.",
    )
    max_new_tokens: Length = Field(64, description="Most tokens that it writes.")
    temperature: Annotated[float, Field(ge=0.01, le=100)] = Field(1.0, description="That it draws with.")
    drop: list[Literal["empty", "repeated", "unended"]] = Field(
        ["empty", "repeated"],
        description="Texts that nothing is learned from: those without a token, those of whose runs of four tokens "
        "less than half differ, those without an end.",
    )

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if not self.loss or "cross_entropy" in self.loss:
            raise ValueError("loss needs a divergence, and no cross_entropy: the labels are the student's own words")
        return self

    def prompt_of(self, context: int) -> int:
        """Tokens of a window of ``context`` before what the student writes."""
        return self.prompt_tokens or context // 2


class MatchSpec(_Strict):
    """Layers of the student that are to give what the teacher's do."""

    weights: dict[MatchName, LossWeight] = Field(
        {"hidden": 1.0},
        description="Weight of each comparison. hidden: what a layer gives; attention: what its attention adds.",
    )
    layers: Annotated[list[Annotated[list[LayerNumber], Field(min_length=2, max_length=2)]], Field(max_length=4096)] = (
        Field(
            [],
            description="Pairs of a layer of the student and one of the teacher, from 0. Default: evenly spaced ones.",
        )
    )

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if not self.weights:
            raise ValueError(f"weights needs at least one of {', '.join(get_args(MatchName))}")
        return self


class LoraSpec(_Strict):
    """Adapters that learn in place of the weights (Hu et al. 2021); they are merged into the student."""

    r: Few = Field(16, description="Rank of an adapter.")
    alpha: Few | None = Field(None, description="An adapter counts alpha / r times. Default: 2 r.")
    targets: Annotated[list[Name], Field(min_length=1, max_length=100)] | None = Field(
        None, description="Matrices of the decoder layers, such as q_proj. Default: all."
    )


class MemorySpec(_Strict):
    """What spares memory while the student learns; `edgekd plan` says how much."""

    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16: weights and gradients take half, and each step is rounded at random, so that small ones "
        "count in the mean; with adamw8bit or lora.",
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: Adam's moments in a byte each.")
    checkpoint_activations: bool = Field(
        False, description="Compute each layer again in the backward pass: a third more work, a fraction of the memory."
    )
    lora: LoraSpec | None = None

    @model_validator(mode="after")
    def _small_steps_count(self) -> MemorySpec:
        if self.weights == "bfloat16" and self.optimizer == "adamw" and not self.lora:
            raise ValueError("weights bfloat16 would lose adamw's small steps: set optimizer to adamw8bit, or lora")
        return self

    @property
    def outcome(self) -> dict[str, object]:
        """What of it decides what comes out, where it is not the default."""
        return self.model_dump(exclude={"checkpoint_activations"}, exclude_defaults=True)


class DistillSpec(TrainingSpec):
    """How the student learns."""

    on_policy: OnPolicySpec | None = Field(None, description="Also learn from text that the student writes itself.")
    match: MatchSpec | None = Field(None, description="Also compare what layers give, by a learned projection.")

    baseline: bool = Field(True, description="Also train the same student on labels alone, same tokens and steps.")
    memory: MemorySpec = MemorySpec()

    @property
    def cacheable(self) -> bool:
        """Whether what a cached teacher tells is enough."""
        return not (self.on_policy or self.match or self.loss.keys() - OF_PART)

    def shareable(self, processes: int) -> bool:
        """Whether so many processes can train together."""
        alone = self.on_policy or self.match or self.memory.optimizer == "adamw8bit"
        return not alone and self.windows_a_step % processes == 0

    def outcome(self, *exclude: str) -> dict[str, object]:
        """See ``TrainingSpec.outcome``."""
        spared = {"memory": self.memory.outcome} if self.memory.outcome else {}
        return super().outcome("memory", *exclude) | spared

    @model_validator(mode="after")
    def _has_one_precision(self) -> Self:
        if self.memory.weights == "bfloat16" and self.precision == "float32":
            raise ValueError("precision float32 cannot be had of memory.weights bfloat16")
        return self


class QadSpec(TrainingSpec):
    """How the quantized student learns: the training loop with the grid in its weights."""

    teacher: Literal["student", "teacher"] = Field(
        "student", description="Whom it imitates: the student before quantization, or the teacher (of several, all)."
    )
    loss: dict[LossName, LossWeight] = {"forward_kl": 1.0}
    steps: Count = 300
    batch_size: Width = Field(16, description="Windows of one forward pass.")
    learning_rate: Annotated[float, Field(gt=0, le=10)] = Field(
        3e-5, description="Small: a weight crosses to the next integer on a hint, and a large rate shakes them all."
    )
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 10
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0


class QuantizeSpec(_Strict):
    """How the int4 integers are chosen, once for every target. int8 rows are always rounded to nearest."""

    method: Method = Field(
        "gptq",
        description="rtn: round to nearest. search: scales of least weighted error. gptq: errors fed back to later "
        "inputs. qad: quantization-aware distillation.",
    )
    compare: list[Method] = Field([], description="Further methods to measure beside it; not exported.")
    calibration_windows: Width = Field(64, description="Windows of training text that search, gptq and qad read first.")
    bits: Annotated[float, Field(ge=4, le=16)] | None = Field(
        None, description="Most bits per weight of portable-mixed, which spends them on int8. Default: the recipe's, 6."
    )
    qad: QadSpec = QadSpec()

    @property
    def methods(self) -> list[Method]:
        """Every method once, the exported one last."""
        return [*dict.fromkeys(m for m in self.compare if m != self.method), self.method]


class TargetSpec(_Strict):
    """One runtime, and the recipes to export for it. Further keys are the target's own, of which its model knows."""

    model_config = ConfigDict(extra="allow")

    target: Name = Field(description="The runtime's name.")
    recipes: Annotated[list[Name], Field(min_length=1, max_length=100)] = Field(
        description="fp16, int8, portable-int4, portable-int4-head4, portable-mixed, or a runtime's own (gguf-q4_k_m)."
    )
    context: Length | None = Field(
        None, description=f"Context length of the artifact; default: the student's, {DEFAULT_CONTEXT} at most."
    )

    def context_of(self, longest: int) -> int:
        """Context length of the artifact of a student whose own is ``longest``."""
        return self.context or min(longest, DEFAULT_CONTEXT)

    @property
    def own_keys(self) -> dict[str, object]:
        """The target's own keys that are not at their defaults."""
        return self.model_dump(mode="json", exclude=set(TargetSpec.model_fields), exclude_defaults=True)


class Thresholds(_Strict):
    """A gate: what is null is measured but not judged."""

    kl_mean_max: Ceiling | None = Field(None, description="Mean KL(reference || artifact), nats per token.")
    kl_p99_max: Ceiling | None = None
    top1_min: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Share of positions with the same most likely token."
    )
    perplexity_ratio_max: Ceiling | None = Field(None, description="Artifact's perplexity over the reference's.")


class VerifySpec(_Strict):
    """What is measured of each artifact, and what fails the run."""

    windows: Width = Field(16, description="Held-out windows to compare on.")
    context: Length = Field(256, description="Tokens of such a window.")
    greedy_tokens: Length = Field(32, description="Tokens to generate when looking for the first that differs.")
    thresholds: dict[str, Thresholds] = Field({}, description="Per recipe; the key default serves the others.")

    def gate(self, recipe: str) -> Thresholds:
        """The thresholds of a recipe."""
        return self.thresholds.get(recipe) or self.thresholds.get("default") or Thresholds()


class BenchSpec(_Strict):
    """What is timed of each artifact."""

    prompt_tokens: Annotated[list[Length], Field(min_length=1, max_length=100)] = Field(
        [32, 256], description="Prompt lengths."
    )
    decode_tokens: Length = 64
    runs: Few = Field(5, description="Repetitions; the report shows medians and keeps every sample.")
    cold_runs: Annotated[int, Field(ge=0, le=2**12)] = Field(
        2, description="Processes that begin with the artifact's files dropped from the page cache."
    )
    curve_seconds: Annotated[float, Field(ge=0, le=1e6)] = Field(
        20, description="Most time for TTFT and decode at lengths up to the whole context; 0: not measured."
    )
    energy_seconds: Annotated[float, Field(ge=0, le=1e6)] = Field(
        10, description="Of each window in which an energy counter is read, where there is one; 0: none is read."
    )
    sustained_minutes: Annotated[float, Field(ge=0, le=1e4)] = Field(
        0, description="Decode for so long without a pause, to see what heat does."
    )
    threads: Few | None = Field(None, description="Default: the physical cores.")


class Spec(_Strict):
    """A whole run."""

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$")] = Field(
        description="Names the run's folder."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    teacher: TeacherSpec | None = Field(None, description="Without one, the student's checkpoint is deployed as it is.")
    student: StudentSpec
    data: DataSpec = DataSpec(source="mixed")
    calibration: DataSpec | None = Field(
        None, description="Text on whose training split the integers are chosen; default: data's."
    )
    distill: DistillSpec = DistillSpec()
    quantize: QuantizeSpec = QuantizeSpec()
    targets: Annotated[list[SerializeAsAny[TargetSpec]], _SOME_TARGETS]
    verify: VerifySpec = VerifySpec()
    bench: BenchSpec = BenchSpec()

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if self.name.split(".")[0].lower() in _DEVICES:
            raise ValueError(f"name: {self.name} is a device on Windows, no folder can have that name")
        artifacts = [(target.target, recipe) for target in self.targets for recipe in target.recipes]
        twice = next((pair for pair in dict.fromkeys(artifacts) if artifacts.count(pair) > 1), None)
        if twice:
            raise ValueError("targets: {} {:.80} stands twice, and one would overwrite the other".format(*twice))
        given = self.model_fields_set
        if self.teacher and "data" not in given:
            raise ValueError("data: what is the student to read? Name a source")
        if not self.teacher and self.student.init != "checkpoint":
            raise ValueError(f"teacher: student.init {self.student.init} needs one; without, init is checkpoint")
        if self.teacher:
            self._check_routes(self.teacher)
            self._check_cached(self.teacher)
            self._check_served(self.teacher)
            self._check_aligned(self.teacher)
            self._check_inside(self.teacher)
        if not self.teacher and "distill" in given:
            raise ValueError("distill: without a teacher nothing is distilled")
        if not self.teacher and self.quantize.qad.teacher == "teacher":
            raise ValueError("quantize.qad.teacher: the spec has no teacher")
        return self

    def _check_cached(self, teacher: TeacherSpec) -> None:
        beyond = self.distill.loss.keys() - OF_PART
        if teacher.signal == "cached" and beyond:
            names = ", ".join(sorted(beyond))
            raise ValueError(f"distill.loss: {names} cannot be had of a cached teacher (teacher.signal)")

    def _check_served(self, teacher: TeacherSpec) -> None:
        """Refuse what a server's log-probabilities cannot give."""
        if not teacher.served:
            return
        spec = self.distill
        _refuse(
            {
                "teacher.more: a served teacher stands alone": teacher.more,
                "teacher.alignment: a served teacher has the student's tokenizer": teacher.alignment == "text",
                "teacher.signal: a served teacher is asked as the training goes": teacher.signal != "online",
                "teacher.weights: a server's model has the weights that it has": teacher.weights != "float32",
                "student.init: a served teacher's student is a checkpoint, whose tokenizer the text is read by": (
                    self.student.init != "checkpoint"
                ),
                "distill.temperature: a server's log-probabilities are those of temperature 1": spec.temperature != 1,
                "distill.match: a server shows nothing of the inside of its model": spec.match,
                "quantize.qad.teacher: a served teacher teaches the student alone": (
                    self.quantize.qad.teacher == "teacher"
                ),
            }
        )

    def _check_aligned(self, teacher: TeacherSpec) -> None:
        """Refuse what a teacher of another tokenizer cannot give."""
        if teacher.alignment != "text":
            return
        spec = self.distill
        infinite = "of a teacher of another tokenizer reverse_kl is infinite"
        _refuse(
            {
                "teacher.more: a teacher of another tokenizer stands alone": teacher.more,
                "student.init: a student with its own tokenizer is a checkpoint": self.student.init != "checkpoint",
                "distill.match: layers of another tokenizer's tokens cannot be compared": spec.match,
                f"distill.loss: {infinite}": "reverse_kl" in spec.loss,
                f"distill.on_policy.loss: {infinite}; name another": (
                    spec.on_policy and "reverse_kl" in spec.on_policy.loss
                ),
                "quantize.qad.teacher: it teaches the student alone": self.quantize.qad.teacher == "teacher",
            }
        )

    def _check_inside(self, teacher: TeacherSpec) -> None:
        """Refuse what needs the teacher itself where something else speaks for it, and texts that nobody can write."""
        spec = self.distill
        if spec.on_policy and teacher.signal == "cached":
            raise ValueError(
                "distill.on_policy: a cached teacher cannot judge what the student writes (teacher.signal)"
            )
        if spec.match and (teacher.signal != "online" or teacher.more):
            raise ValueError("distill.match: it reads the inside of one teacher that runs beside the student")
        if spec.on_policy:
            prompt = spec.on_policy.prompt_of(self.data.context)
            if prompt + spec.on_policy.max_new_tokens > self.data.context:
                words = f"{prompt} prompt_tokens and {spec.on_policy.max_new_tokens} max_new_tokens"
                raise ValueError(f"distill.on_policy: {words} are more than data.context {self.data.context}")

    def _check_routes(self, teacher: TeacherSpec) -> None:
        """Refuse teachers of no source, and sources of no teacher."""
        named = [name for one in teacher.each for name in one.sources]
        if unknown := next((name for name in named if name not in self.data.sources), None):
            raise ValueError(f"teacher.sources: {unknown:.100} is none of data.sources")
        if untaught := next((name for name in self.data.each if not sum(teacher.shares(name))), None):
            raise ValueError(f"teacher.sources: nobody teaches {untaught:.100}; leave one teacher's sources out")


def _refuse(faults: Mapping[str, object]) -> None:
    """Raise the first sentence that is true."""
    if words := next((words for words, true in faults.items() if true), None):
        raise ValueError(words)


def spec_of(targets: Mapping[str, type[TargetSpec]]) -> type[Spec]:
    """The spec whose targets are these alone, each with its own keys: what files are read by, and the JSON Schema.

    Args:
        targets: the model of each target's section, by name; two or more.
    """
    # Types made of values: beyond what a type checker follows.
    make: Any = create_model
    sections = [make(n, __base__=m, __doc__=m.__doc__, target=Literal[n]) for n, m in targets.items()]  # type: ignore
    section: Any = Annotated[reduce(or_, sections), Field(discriminator="target")]
    made: type[Spec] = make("Spec", __base__=Spec, __doc__=Spec.__doc__, targets=(list[section], _SOME_TARGETS))
    return made


def builtin_spec(name: str) -> Path | None:
    """The shipped spec of that name (``quickstart``), or None."""
    path = Path(str(resources.files("edgekd") / "specs" / f"{name}.yaml"))
    return path if _is_file(path) else None


def load_spec(path: str | Path, *, seed: int | None = None, model: type[Spec] = Spec) -> Spec:
    """Read and check a spec, given as a file or as the name of a shipped one.

    Args:
        seed: instead of the file's.
        model: of ``spec_of``, to check the targets' own keys too.

    Raises:
        SpecError: the file is missing, is not YAML, or a key in it is unknown or wrong.
    """
    file = Path(path)
    if not _is_file(file):
        file = builtin_spec(str(path)) or file
    if not _is_file(file):
        raise SpecError(f"{path}: no such spec.", "Write one with: edgekd init")
    raw = read_yaml(file, SpecError)
    if not isinstance(raw, dict):
        raise SpecError(f"{file}: a spec is a mapping with keys such as teacher, student, targets.", "See: edgekd init")
    if seed is not None:
        raw["seed"] = seed
    return checked(model, raw, str(file))


def of_options(kind: type[M], **options: Any) -> M:
    """A section of the spec from the command line's options, those that are None left at their defaults.

    Raises:
        SpecError: an option is out of bounds.
    """
    return checked(kind, {name: value for name, value in options.items() if value is not None}, "the command line")


def key_values(words: Sequence[str]) -> dict[str, object]:
    """What ``KEY=VALUE`` words say; a value is JSON, and else a word.

    Raises:
        SpecError: a word has no ``=``.
    """
    found: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise SpecError(f"the command line: option {word!r:.200} is not KEY=VALUE.")
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError):
            found[key] = value
    return found


def checked(kind: type[M], given: dict[str, object], where: str) -> M:
    """A part of the spec from plain values.

    Args:
        where: what gave them, for the message.

    Raises:
        SpecError: a key is unknown or wrong.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise SpecError(f"{where}: {_explain(given, error, kind)}") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _explain(raw: dict[str, object], error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence for the first complaint, and a count of the rest."""
    # A mistyped key is both unknown and missing: the unknown one says more.
    complaints = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    first = complaints[0]
    where = _yaml_path(raw, first["loc"], missing=first["type"] == "missing")
    if first["type"].startswith("union_tag"):  # the key that chooses among sections
        where = [*where, name := first["ctx"]["discriminator"].strip("'")]
    key = repr(".".join(str(part) for part in where) or "(top level)")[:_MAX_SHOWN]
    message = " ".join(first["msg"].removeprefix("Value error, ").split())[:_MAX_SHOWN]
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(model, first["loc"][:-1])
        text = f"unknown key {key}; {nearest(str(first['loc'][-1]), valid, 'valid keys')}"
    elif first["type"] == "union_tag_invalid":
        valid = re.findall(r"'([^']+)'", first["ctx"]["expected_tags"])
        tag = first["ctx"]["tag"]
        text = f"key {key}: unknown {name} {tag!r:.200}; {nearest(tag, valid, 'there are')}"
    elif first["type"] in ("missing", "union_tag_not_found"):
        text = f"key {key} is missing."
    elif first["type"] == "value_error":
        text = f"key {key}: {message}."
    else:
        text = f"key {key}: {message[0].lower() + message[1:]} (given: {first['input']!r:.60})."
    more = len(complaints) - 1
    return text + (f" And {more} more." if more else "")


def nearest(word: str, valid: Sequence[str], title: str = "there are") -> str:
    """A hint for a word that is none of the valid ones: the one that was meant, or all of them."""
    near = difflib.get_close_matches(word[:_MAX_SHOWN], valid, 1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"{title}: {', '.join(valid)}."


def _yaml_path(raw: Any, loc: tuple[int | str, ...], *, missing: bool) -> list[int | str]:
    """``loc`` without the names of union members that pydantic puts in.

    Args:
        missing: its last part is a key that is not there.
    """
    path: list[int | str] = []
    for i, part in enumerate(loc):
        if part == "[key]":
            continue
        if isinstance(raw, dict) and part not in raw and not (missing and i == len(loc) - 1):
            continue
        path.append(part)
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            raw = None
    return path


def _valid_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at ``loc``, found in the JSON Schema."""
    schema = model.model_json_schema()
    node: Any = schema
    for part in loc:
        node = _deref(schema, node)
        if "oneOf" in node:
            node = _deref(schema, {"$ref": node["discriminator"]["mapping"][part]})
        elif isinstance(part, int):
            node = node["items"]
        else:
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
    return list(_deref(schema, node).get("properties", {}))


def _deref(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    node = next((one for one in node.get("anyOf", ()) if "$ref" in one), node)  # a section that may be left out
    return schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node

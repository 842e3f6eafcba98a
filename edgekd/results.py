"""What a run tells: ``results.json``, from which the console and the report read."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from .manifest import Manifest
from .proof import Hop, Quality, SeedQuality


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True)


class MadeArtifact(_Told):
    """An artifact of the run."""

    manifest: Manifest
    folder: str
    size_bytes: int

    @property
    def column(self) -> tuple[str, str]:
        """Target, as its makers write it, and recipe without the target's name."""
        target = self.manifest.target
        return self.manifest.target_title or target, self.manifest.recipe.removeprefix(f"{target}-")

    @property
    def label(self) -> str:
        """Target and recipe: ``GGUF portable-int4``, ``GGUF q4_k_m``."""
        return " ".join(self.column)

    @property
    def was_judged(self) -> bool:
        """Whether verification has held it against its gate."""
        return self.manifest.parity is not None and self.manifest.parity.failures is not None

    @property
    def failures(self) -> list[str]:
        """What missed its gate, a sentence each."""
        return (self.manifest.parity.failures if self.manifest.parity else None) or []

    @property
    def kl_mean(self) -> float | None:
        """Nats per token to the student; None: not verified."""
        return self.manifest.parity.kl_mean if self.manifest.parity else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None: not timed."""
        return self.manifest.benchmark.decode_tokens_per_s.value if self.manifest.benchmark else None


class CurvePoint(_Told):
    """A validation while training."""

    step: int
    validation_perplexity: float


class Training(_Told):
    """The curves of what the first seed trained."""

    student: list[CurvePoint] = []
    baseline: list[CurvePoint] = []


class StageTime(_Told):
    """A stage, and how long it took when it was done."""

    name: str
    seconds: float


class StageFigures(_Told):
    """What a stage tells of itself; its own numbers stand beside it, as they are."""

    model_config = ConfigDict(extra="allow")

    warnings: list[str] = []
    """What the user must see."""


class Results(_Told):
    """Everything that was measured. A key that is absent or null was not."""

    name: str = "Unnamed run"
    created: str | None = None
    folder: str | None = None
    spec: Mapping[str, object] = {}
    versions: Mapping[str, str] = {}
    data: StageFigures = StageFigures()
    quality: Quality | None = None
    """Of the spec's own seed."""
    seeds: list[SeedQuality] = []
    training: Training = Training()
    ledger: list[Hop] = []
    artifacts: list[MadeArtifact] = []
    stages: list[StageTime] = []
    commands: list[str] = []

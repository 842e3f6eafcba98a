"""What a target is: a module of these names, in a package of its own with all that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import ConfigDict

from ...manifest import Artifact
from ...session import Session
from ...spec import TargetSpec


class TargetOptions(TargetSpec):
    """The target's section of the spec; a target with keys of its own adds them."""

    model_config = ConfigDict(extra="forbid")


class Target(Protocol):
    """A target's module. It imports its runtime in the functions that need it, and nothing else that is heavy.

    More functions are optional; ``asked`` is a section of the spec, or a manifest's ``details``:

    - ``inspect(artifact)``: what an artifact is refused for before its runtime sees it; raises ``BadArtifact``.
    - ``stand_in(asked: Mapping[str, object]) -> str | None``: what opens artifacts on this machine in place of their
      own runtime, which is bound to another system, or of a GPU. What such a session computes is the artifact's; how
      long it takes says nothing of the runtime, so it is never timed.
    - ``gpu(asked: Mapping[str, object]) -> str | None``: what beside the CPU computes an artifact here, a part of every
      benchmark's key.
    - ``describe_gpus() -> str``: the GPUs that its runtime has here; raises ``NoGpu``, with how to get one.
    - ``install(again: bool) -> str``: the command that installs its packages here, or replaces them, where
      ``pip install`` alone does not do.
    - ``arithmetic(recipe: Recipe, asked: Mapping[str, object]) -> Arithmetic``: in what precision its runtime
      multiplies, from which verification knows how much of a difference is rounding; default: float32.
    - ``cache_value_bytes(spec: Options) -> int``: of a number in its key-value cache, for the plan.
    - ``build_flags() -> str``: the instructions that its runtime was built for, a part of every benchmark's key.
    - ``explain_crash(signal: str) -> tuple[str, str] | None``: why its runtime died, and the remedy.
    """

    TITLE: str
    """As its makers write it."""
    EXTRA: str
    """Of the distribution that brings the target; empty for one that needs none."""
    PACKAGES: tuple[str, ...]
    """The distributions it needs, whose versions decide what it makes."""
    Options: type[TargetOptions]
    """Its section of the spec."""

    def check(self, config: Mapping[str, object], tokenizer_folder: Path, spec: Any) -> None:
        """As ``targets.check``; ``spec`` is of ``Options``."""

    def export(
        self,
        student: Path,
        spec: Any,
        recipe: str,
        out_dir: Path,
        *,
        name: str,
        quantized: Path | None = None,
        moments: Path | None = None,
    ) -> Artifact:
        """As ``targets.export``; ``spec`` is of ``Options``."""
        ...

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        """The artifact in its runtime."""
        ...

    def self_test(self) -> str:
        """Prove that the runtime works here, and say what was tried.

        Raises:
            Exception: of any kind, with what is wrong.
        """
        ...


OFFERED = ("TITLE", "EXTRA", "PACKAGES", "Options", "check", "export", "open", "self_test")
"""What no target is without."""

"""The parts of coremltools that the exporter uses, imported once and without its noise."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...errors import MissingExtra
from ..shared.artifact import quiet


@cache
def builder() -> SimpleNamespace:
    """``mb``, ``types``, ``get_new_symbol``, ``iOS18``, ``Exporter``.

    Raises:
        MissingExtra: coremltools is not installed.
    """
    try:
        with quiet():
            from coremltools.converters.mil import Builder
            from coremltools.converters.mil._deployment_compatibility import AvailableTarget
            from coremltools.converters.mil.backend.mil.load import MILProtoExporter
            from coremltools.converters.mil.mil import get_new_symbol, types
    except ModuleNotFoundError as error:
        raise MissingExtra("coremltools", "coreml") from error
    return SimpleNamespace(
        mb=Builder, types=types, get_new_symbol=get_new_symbol, iOS18=AvailableTarget.iOS18, Exporter=MILProtoExporter
    )


def model(package: Path) -> Any:
    """The package loaded by Core ML (macOS alone), on CPU and GPU: what Apple's own recipe for language models uses."""
    builder()
    import coremltools

    return coremltools.models.MLModel(str(package), compute_units=coremltools.ComputeUnit.CPU_AND_GPU)

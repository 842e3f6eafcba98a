"""Where an imported model comes from, and what was proved of it: ``origin.json`` of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import EdgekdError
from .files import inside, read_json
from .manifest import first_complaint
from .proof import Comparison

ORIGIN = "origin.json"


class Origin(BaseModel):
    """``origin.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    format: Literal["gguf"]
    file: str
    """Its name."""
    file_sha256: str
    name: str | None = None
    """As the file has it."""
    license: str | None = None
    dequantized_from: list[str] = Field(max_length=64)
    """The types that weights were quantized in, the most frequent first; empty: none was."""
    tokenizer_texts: int
    """Texts whose ids are the runtime's on the file, every one."""
    logits: Comparison
    """The folder's in float32 against the runtime's on the file, its weights dequantized by the runtime itself."""

    @property
    def remark(self) -> str | None:
        """What must be said where formats of the model are compared; nothing of a model that was never quantized."""
        if not self.dequantized_from:
            return None
        return f"dequantized from {' and '.join(self.dequantized_from)}; favours formats like it"


def read_origin(folder: Path) -> Origin | None:
    """A model folder's origin; None of one that was not imported.

    Raises:
        EdgekdError: the file is damaged.
    """
    path = inside(folder, ORIGIN)
    if not path.is_file():
        return None
    try:
        return Origin.model_validate(read_json(path, remedy="Import the model again."))
    except ValidationError as error:
        raise EdgekdError(f"{path}: {first_complaint(error)}.", "Import the model again.") from error

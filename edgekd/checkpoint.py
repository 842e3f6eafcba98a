"""The weights of a model folder, as transformers 5 reads them, for teacher, student and reference alike.

``model.safetensors`` counts, or the shards that ``model.safetensors.index.json`` names, and nothing beside them. Shapes
follow ``torch.nn.Linear``: weights are ``(out, in)``.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .architecture import EMBEDDING, HEAD, Architecture, Decoder, read_architecture, read_config, read_decoder
from .errors import EdgekdError
from .files import file_sha256, inside, read_json

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
_LOG = logging.getLogger(__name__)
_FLOATS = ("F64", "F32", "F16", "BF16")
_COMPILED = "_orig_mod."
_BUFFER = ".rotary_emb.inv_freq"
"""Old files hold it; it follows from the configuration."""
_DESCRIBING = (".json", ".jinja", ".model", ".py")
_ADAPTER = ("base_model.model.", ".base_layer.", ".lora_")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what it is."""

    file: Path
    name: str
    """In the file, which may differ from the name that the model gives it."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: ``BF16``."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder read lazily: one tensor in memory at a time. It is a collection of tensor names.

    Args:
        beside: a further safetensors file of the folder that counts where it is there.
    """

    folder: Path
    beside: str = ""

    @cached_property
    def config(self) -> dict[str, object]:
        """``config.json``, checked. A tie of head and embedding that the weights contradict is no tie.

        Raises:
            EdgekdError: it cannot be read, or a key holds what no model could have.
        """
        broken = self.decoder.tie_word_embeddings and HEAD in self and not self.tied
        return {**self._config, "tie_word_embeddings": False} if broken else self._config

    @cached_property
    def _config(self) -> dict[str, object]:
        return read_config(self._file("config.json"))

    @cached_property
    def decoder(self) -> Decoder:
        """The configuration as ``config.json`` states it, whatever the weights are."""
        return read_decoder(self._config, str(self.folder / "config.json"))

    @cached_property
    def architecture(self) -> Architecture:
        """What the model is made of.

        Raises:
            EdgekdError: a number is missing that is needed to say so.
        """
        return read_architecture(self.config, str(self.folder / "config.json"))

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by the name that the model gives it.

        Raises:
            EdgekdError: there are none, a file is damaged, a shard lacks a tensor that the index promises, a tensor is
                there twice, or the weights say nothing by themselves: an adapter, or integers without scales.
        """
        found: dict[str, Stored] = {}
        for path, promised in self._weight_files().items():
            stored = _read_header(path)
            for name in promised:
                if name not in stored:
                    raise EdgekdError(
                        f"{path}: tensor {name!r} is missing, which {INDEX_FILE} promises.", "Copy the model again."
                    )
            for name, place in stored.items():
                if name.endswith(_BUFFER):
                    continue
                if (plain := name.replace(_COMPILED, "")) in found:
                    raise EdgekdError(
                        f"{path}: tensor {name!r} is there twice, in {found[plain].file.name} too.", "Save it again."
                    )
                found[plain] = place
        self._check_alone(found)
        return self._renamed(found)

    def _weight_files(self) -> dict[Path, list[str]]:
        """The files that count, each with the tensors that the index promises of it."""
        named = self.decoder.transformers_weights
        for path in map(self._file, [named] if named else ["model.safetensors", INDEX_FILE]):
            if path.is_file():
                files = self._indexed(path) if path.suffix == ".json" else {path: []}
                beside = [self._file(self.beside)] if self.beside else []
                return files | {other: [] for other in beside if other.is_file()}
        if (self.folder / "adapter_config.json").is_file():
            raise EdgekdError(f"{self.folder}: it holds an adapter (PEFT), not a model.", "Merge it into its model.")
        others = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
        only = f"; {', '.join(others[:3])} is not read" if others else ""
        raise EdgekdError(
            f"{self.folder}: it has no {named or f'model.safetensors and no {INDEX_FILE}'}{only}.",
            "Save the model with save_pretrained.",
        )

    def _indexed(self, index: Path) -> dict[Path, list[str]]:
        files = read_json(index, remedy="Save the model again.").get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise EdgekdError(f"{index}: key 'weight_map' names no files.", "Save the model again.")
        promised: dict[Path, list[str]] = {self._file(name): [] for name in sorted(set(files.values()))}
        for tensor, name in files.items():
            promised[self._file(name)].append(tensor)
        return promised

    def _file(self, name: str) -> Path:
        """A file of the folder. Only the links of the hub's cache lead out of it, from a snapshot to its blobs."""
        absolute = self.folder.absolute()
        if absolute.parent.name == "snapshots" and (absolute.parents[1] / "blobs").is_dir():
            return inside(absolute.parents[1], f"snapshots/{absolute.name}/{name}")
        return inside(self.folder, name)

    def _check_alone(self, found: dict[str, Stored]) -> None:
        """Refuse weights that are only part of a model, or mean something only by other tensors."""
        adapter = next((name for name in found if any(mark in name for mark in _ADAPTER)), None)
        if adapter or (self.folder / "adapter_config.json").is_file():
            raise EdgekdError(
                f"{self.folder}: it holds an adapter (PEFT): {adapter or 'adapter_config.json'}.",
                "Merge it into its model, or remove it, and save the model alone.",
            )
        for name, stored in found.items():
            if name.endswith((".weight", ".bias")) and stored.dtype not in _FLOATS:
                raise EdgekdError(
                    f"{stored.file}: tensor {name!r} is {stored.dtype}, which is not read without its scales.",
                    "Save the model in bfloat16.",
                )
        if any(_COMPILED in stored.name for stored in found.values()):
            _LOG.warning("%s: torch.compile's prefix %s is left out of names.", self.folder, _COMPILED)

    def _renamed(self, found: dict[str, Stored]) -> dict[str, Stored]:
        """By transformers' names: a decoder saved alone lacks its prefix, and a tied pair may be one head."""
        prefix, bare = "model.", ("embed_tokens.", "layers.", "norm.")
        if EMBEDDING.removeprefix(prefix) in found and not any(name.startswith(prefix) for name in found):
            found = {f"{prefix}{name}" if name.startswith(bare) else name: at for name, at in found.items()}
        if EMBEDDING not in found and HEAD in found and self.decoder.tie_word_embeddings:
            found[EMBEDDING] = found.pop(HEAD)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @cached_property
    def kinds(self) -> dict[str, Literal["plain"]]:
        """How each tensor is stored, in the words of ``quant.recipe.Kind``: as it is."""
        return dict.fromkeys(self, "plain")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.tensors[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the dtype of the file."""
        from safetensors import safe_open

        stored = self.tensors[name]
        with safe_open(stored.file, "pt") as file:
            return file.get_tensor(stored.name)

    def rows(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """A matrix in pieces of ``count`` whole rows, in the dtype of the file."""
        from safetensors import safe_open

        stored = self.tensors[name]
        with safe_open(stored.file, "pt") as file:
            matrix = file.get_slice(stored.name)
            for start in range(0, stored.shape[0], count):
                yield matrix[start : start + count].contiguous()

    def blocks(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The integers and scales of a quantized matrix, of which there are none here."""
        raise ValueError(f"{self.folder}: tensor {name!r} is not quantized")

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Put a tensor and its file before an error that lacks its subject."""
        try:
            yield
        except EdgekdError as error:
            raise EdgekdError(f"{self.tensors[name].file}: tensor {name!r} {error.cause}", error.remedy) from error

    @property
    def parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(math.prod(self.shape(name)) for name in self if not (self.tied and name == HEAD))

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding: said to be, and not contradicted by a head of its own.

        Raises:
            EdgekdError: the configuration wants a head of its own, and there is none.
        """
        import torch

        tied = bool(self.decoder.tie_word_embeddings)
        if HEAD not in self:
            if EMBEDDING in self and not tied:
                raise EdgekdError(
                    f"{self.folder}: tensor {HEAD!r} is missing, and config.json does not tie it to the embedding.",
                    "Save the model again.",
                )
            return tied
        if not tied or EMBEDDING not in self or self.shape(HEAD) != self.shape(EMBEDDING):
            return False
        pairs = zip(self.rows(HEAD, 1024), self.rows(EMBEDDING, 1024), strict=True)
        return all(torch.equal(a.float(), b.float()) for a, b in pairs)

    @cached_property
    def digest(self) -> str:
        """sha256 over configuration, tokenizer and the weights that count."""
        counted = {stored.file for stored in self.tensors.values()}
        whole = hashlib.sha256()
        counted |= {self._file(path.name) for path in self.folder.glob("*") if path.suffix in _DESCRIBING}
        for path in sorted(path for path in counted if path.is_file()):
            whole.update(path.relative_to(self._file("config.json").parent).as_posix().encode())
            whole.update(bytes.fromhex(file_sha256(path)))
        return whole.hexdigest()


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, which is checked to be whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(path, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise EdgekdError(f"{path}: truncated or not safetensors ({error}).", "Copy it again.") from error

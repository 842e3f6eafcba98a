"""A GGUF file of a stranger, read: typed keys and tensors, one in memory at a time.

Shapes follow ``torch.nn.Linear``: weights are ``(out, in)``; GGUF lists dimensions reversed.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EdgekdError, MissingExtra, Unsupported

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

_AGAIN = "Get the file again from its source."
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that safetensors holds as they are."""


class GgufFile:
    """Keys and tensors.

    Raises:
        EdgekdError: it cannot be read, or is not GGUF.
        MissingExtra: the gguf package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _read(path)

    @cached_property
    def tensors(self) -> dict[str, ReaderTensor]:
        """Every tensor by its name in the file."""
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def types(self) -> Counter[str]:
        """How many tensors there are of each ggml type."""
        return Counter(tensor.tensor_type.name for tensor in self.tensors.values())

    @property
    def dequantized(self) -> list[str]:
        """The quantized types among them, the most frequent first."""
        return [name for name, _ in self.types.most_common() if name not in _STORED]

    def names(self, prefix: str) -> list[str]:
        """The keys that begin so."""
        return [name for name in self._reader.fields if name.startswith(prefix)]

    def get(self, key: str, kind: type | UnionType, default: Any = None) -> Any:
        """A key's value, or the default where the file lacks it.

        Raises:
            EdgekdError: it is of another type.
        """
        field = self._reader.fields.get(key)
        if field is None:
            return default
        try:
            value = field.contents()
        except (ValueError, IndexError) as error:  # ValueError: text that is not UTF-8
            raise EdgekdError(f"{self.path}: key {key!r} is not readable ({error!s:.100}).", _AGAIN) from error
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise EdgekdError(f"{self.path}: key {key!r} is {value!r:.60}, a {type(value).__name__}.", _AGAIN)
        # A float32 in as few digits as tell it apart: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str, kind: type) -> Any:
        """A key's value.

        Raises:
            EdgekdError: the file lacks it, or it is of another type.
        """
        value = self.get(key, kind)
        if value is None:
            raise EdgekdError(f"{self.path}: key {key!r} is missing.", _AGAIN)
        return value

    def dtype(self, name: str) -> str:
        """The dtype in which a tensor loses nothing: its own, or float32 where it is quantized."""
        return _STORED.get(self.tensors[name].tensor_type.name, "float32")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(int(side) for side in reversed(self.tensors[name].shape))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, dequantized where it is quantized.

        Raises:
            EdgekdError: it holds values that are not finite.
            Unsupported: a type that the gguf package does not dequantize.
        """
        import torch
        from gguf import dequantize

        found = self.tensors[name]
        if found.tensor_type.name == "BF16":
            value = torch.from_numpy(found.data.copy()).view(torch.bfloat16)
        elif found.tensor_type.name in _STORED:
            value = torch.from_numpy(found.data.copy())
        else:
            try:
                with np.errstate(all="ignore"):
                    value = torch.from_numpy(dequantize(found.data, found.tensor_type))
            except (NotImplementedError, KeyError) as error:
                raise Unsupported(
                    f"{self.path}: tensor {name!r} is {found.tensor_type.name}, which cannot be dequantized here.",
                    "Take a file of another quantization.",
                ) from error
        if not value.isfinite().all():
            raise EdgekdError(f"{self.path}: tensor {name!r} holds values that are not finite.", _AGAIN)
        return value.reshape(self.shape(name))


def _read(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise MissingExtra("gguf", "gguf") from error
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise EdgekdError(f"{path}: it does not begin with GGUF.", "Name a GGUF file.")
        return GGUFReader(path)
    except OSError as error:
        raise EdgekdError(f"{path}: cannot be read: {error.strerror}.", "Name a GGUF file.") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise EdgekdError(f"{path}: truncated or not GGUF ({error!s:.120}).", _AGAIN) from error

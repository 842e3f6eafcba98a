"""An ExecuTorch program in its own runtime: prefill and decode over the cache inside the program.

Shapes: ``T`` tokens, ``V`` vocabulary. Logits are float32.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadArtifact, EdgekdError, MissingExtra
from ...manifest import Contract
from ..shared.session import BATCH_TOKENS

PREFILL, ALL = "forward", "all_logits"
CHUNK = BATCH_TOKENS
"""Most tokens of a call: memory for the results of so many is planned."""
ROWS = 128
"""Most tokens of a call of ``all_logits``."""


def runtime() -> Any:
    """``executorch.runtime``'s ``Runtime``, with the kernels that a program of this target calls.

    Raises:
        MissingExtra: ExecuTorch is not installed.
        EdgekdError: it is installed but does not load.
    """
    try:
        # On a stack of its own: the import parses YAML in Python for two seconds, and CPython 3.11 takes twice as long
        # for a loop whose calls happen to cross from one chunk of its frame stack into the next.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(_import).result()
    except ModuleNotFoundError as error:
        raise MissingExtra("executorch", "executorch") from error
    except (ImportError, OSError) as error:
        raise EdgekdError(f"executorch does not load: {error}.", "Run: edgekd doctor") from error


def _import() -> Any:
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - attention and its cache
    from executorch.kernels import quantized  # noqa: F401 - embedding kernels
    from executorch.runtime import Runtime

    return Runtime.get()


def runner_tokenizer(path: Path, contract: Contract) -> Callable[[str], list[int]]:
    """Text → ids by the tokenizer of ExecuTorch's runners.

    Raises:
        MissingExtra: it is not installed.
        EdgekdError: it refuses the file.
    """
    with silent():
        try:
            from pytorch_tokenizers import CppHFTokenizer
        except ModuleNotFoundError as error:
            raise MissingExtra("pytorch-tokenizers", "executorch") from error
        tokenizer = CppHFTokenizer()
        try:
            tokenizer.load(str(path))
        except RuntimeError as error:
            raise EdgekdError(f"{path}: ExecuTorch refuses the tokenizer: {error}.") from error
    return lambda text: list(tokenizer.encode(text, int(contract.add_bos), 0))


@contextmanager
def silent() -> Iterator[None]:
    """Hold back what native code writes to standard error; its failures come as exceptions."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def head_sha256(path: Path, size: int) -> str:
    """Hex digest of the first bytes of a file."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


def set_threads(threads: int) -> None:
    """Size of the thread pool that all programs of the process share.

    Raises:
        EdgekdError: one is open with another size; made anew beneath it, the pool would end the process.
    """
    from executorch.extension.pybindings import portable_lib

    if (size := portable_lib._threadpool_get_thread_count()) == threads:
        return
    if _open_engines:
        raise EdgekdError(
            f"An ExecuTorch artifact is open in this process with {size} threads, and all share one pool.",
            f"Close it before one is opened with {threads}, or open this one with {size}.",
        )
    portable_lib._unsafe_reset_threadpool(threads)


@functools.cache
def _mkl() -> tuple[Callable[[int], int], Callable[[int], None], int] | None:
    """Where MKL is part of PyTorch: its setter of the calling thread's number of threads, which returns the one before;
    that of all other threads'; and what the latter is."""
    import torch

    try:
        lib = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        set_own, set_default = lib.MKL_Set_Num_Threads_Local, lib.mkl_serv_set_num_threads
        told = lib.mkl_serv_get_max_threads
    except (OSError, AttributeError):
        return None
    torch.set_num_threads(torch.get_num_threads())  # else a new thread's torch asks MKL, perhaps in a decode
    own = set_own(0)
    default = told()
    set_own(own)
    return set_own, set_default, default


@contextmanager
def one_thread_a_product() -> Iterator[None]:
    """Have MKL work on the thread that calls it. Attention, in ExecuTorch's Python package, calls it on every thread of
    the pool, where it would start a team of its own: a token then took up to three times as long."""
    if (mkl := _mkl()) is None:
        yield
        return
    set_own, set_default, default = mkl
    own = set_own(1)
    set_default(1)
    try:
        yield
    finally:
        set_default(default)
        set_own(own)


def execute(method: Any, ids: Sequence[int], start: int) -> Any:
    """Run a decoder's method on ids behind ``start`` cached ones; its logits, a torch tensor."""
    import torch

    inputs = [torch.tensor([list(ids)], dtype=torch.long), torch.tensor([start])]
    with one_thread_a_product():
        return method.execute(inputs)[0]


_open_engines: weakref.WeakSet[ExecutorchEngine] = weakref.WeakSet()


class ExecutorchEngine:
    """An ExecuTorch program: the ``Engine`` protocol."""

    def __init__(self, path: Path, threads: int) -> None:
        try:
            with silent():
                lib = runtime()
                set_threads(threads)
                self._program: Any = lib.load_program(path)
        except RuntimeError as error:
            raise BadArtifact(f"{path}: ExecuTorch does not load it: {error}.", "Export the artifact again.") from error
        self._path = path
        self._forward = self._method(PREFILL)
        _open_engines.add(self)

    def _method(self, name: str) -> Any:
        try:
            with silent():
                return self._program.load_method(name)
        except RuntimeError as error:
            raise BadArtifact(
                f"{self._path}: ExecuTorch does not load its method {name}: {error}.",
                "Free memory, or export the artifact again.",
            ) from error

    def number(self, name: str) -> int:
        """What a method of the program says that takes nothing and gives a number.

        Raises:
            BadArtifact: there is none.
        """
        try:
            values = self._method(name).execute([])
        except RuntimeError as error:
            raise BadArtifact(f"{self._path}: its method {name} fails: {error}.", "Export it again.") from error
        if len(values) != 1 or not isinstance(values[0], int):
            raise BadArtifact(f"{self._path}: its method {name} gives no number.", "Export the artifact again.")
        return values[0]

    def feed(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids; logits of the last."""
        return self._run(self._forward, ids, start)[0]

    def feed_all(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids; logits of all."""
        method = self._method(ALL)
        pieces = ((ids[i : i + ROWS], start + i) for i in range(0, len(ids), ROWS))
        return np.concatenate([self._run(method, piece, at) for piece, at in pieces])

    def _run(self, method: Any, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids; logits ``(1, V)`` or ``(T, V)``."""
        try:
            return execute(method, ids, start)[0].numpy()
        except RuntimeError as error:
            raise EdgekdError(f"ExecuTorch failed on {len(ids)} tokens: {error}.") from error

    def reset(self) -> None:
        """What is cached is written over."""

    def rewind(self, length: int) -> bool:
        """What is behind is written over."""
        return True

    def close(self) -> None:
        """Free the runtime's memory."""
        self._program = self._forward = None
        _open_engines.discard(self)

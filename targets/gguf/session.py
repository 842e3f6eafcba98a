"""llama.cpp at work, through its C API: load, tokenize, prefill, decode.

Shapes: ``T`` tokens, ``V`` vocabulary. Logits are float32.
"""

from __future__ import annotations

import ctypes
import os
import unicodedata
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadArtifact, EdgekdError, MissingExtra
from ...manifest import Contract
from ..shared.artifact import check_contract
from ..shared.session import BATCH_TOKENS
from .gpu import BACKEND_PATH, Gpu, load_backend

_log: deque[str] = deque(maxlen=40)
_keep_alive: list[Any] = []


@cache
def runtime() -> Any:
    """The ``llama_cpp`` module, silent and ready.

    Raises:
        MissingExtra: it is not installed.
        EdgekdError: it is installed but does not load.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else an assertion of ggml starts a debugger, which may hang
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise MissingExtra("llama-cpp-python", "gguf") from error
    except (OSError, RuntimeError) as error:
        raise EdgekdError(f"llama-cpp-python does not load: {error}.", "Run: edgekd doctor") from error

    @llama_cpp.llama_log_callback
    def remember(level: int, text: bytes, _user_data: Any) -> None:
        if level in (3, 4):  # warnings and errors
            _log.append(text.decode("utf-8", "replace").strip())

    _keep_alive.append(remember)
    llama_cpp.llama_log_set(remember, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if not load_backend():
        raise EdgekdError(
            f"{BACKEND_PATH}: llama.cpp does not load the backend {os.environ[BACKEND_PATH]}: {said()}.",
            "Build it with: make vulkan",
        )
    return llama_cpp


def said() -> str:
    """What llama.cpp last complained of, on one line."""
    lines = [line for line in _log if line]
    return " | ".join(lines[-3:]) or "it gave no reason"


def load_model(
    path: Path,
    *,
    vocab_only: bool = False,
    pre_tokenizer: str | None = None,
    gpus: Sequence[Gpu] = (),
    gpu_layers: int = 0,
) -> Any:
    """A ``llama_model`` pointer; free it with ``llama_model_free``.

    Args:
        vocab_only: read the tokenizer alone.
        pre_tokenizer: overrides the file's ``tokenizer.ggml.pre``.
        gpus: what ``gpu_layers``, the last ones, are computed on; none: all is computed on the CPU.

    Raises:
        BadArtifact: llama.cpp refuses the file.
    """
    lib = runtime()
    params = lib.llama_model_default_params()
    params.vocab_only = vocab_only
    # Without a list llama.cpp takes every GPU that it finds, for products of long prompts even at no layers.
    devices = (ctypes.c_void_p * (len(gpus) + 1))(*(gpu.handle for gpu in gpus))  # the last, empty one ends the list
    params.devices, params.n_gpu_layers = ctypes.addressof(devices), gpu_layers
    overrides = (lib.llama_model_kv_override * 2)()  # the second, empty one ends the list
    if pre_tokenizer is not None:
        overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_STR
        overrides[0].key = b"tokenizer.ggml.pre"
        overrides[0].value.val_str = pre_tokenizer.encode()
        params.kv_overrides = overrides
    _log.clear()
    with path.open("rb") as file:
        magic = file.read(4)
    model = lib.llama_model_load_from_file(str(path).encode(), params) if magic == b"GGUF" else None
    if not model:
        reason = said() if magic == b"GGUF" else "it does not begin with GGUF"
        remedy = "Free the GPU's memory, or export with fewer gpu_layers." if gpus else "Export the artifact again."
        raise BadArtifact(f"{path}: llama.cpp does not load it: {reason}.", remedy)
    return model


def tokenize(lib: Any, vocab: Any, text: str, *, whole: bool = False) -> list[int]:
    """Ids of a text, in which nothing is a special token and to which nothing is added.

    Args:
        whole: parse special tokens in it, add BOS and EOS as the file says.
    """
    data = text.encode("utf-8")
    room = len(data) + 8
    while True:
        ids = (lib.llama_token * room)()
        count = lib.llama_tokenize(vocab, data, len(data), ids, room, whole, whole)
        if count >= 0:
            return list(ids[:count])
        room = -count


def as_llama_cpp_reads(text: str, contract: Contract, *, start: bool = True) -> str:
    """A text with what the contract leaves to the caller."""
    if contract.normalizer:
        text = unicodedata.normalize(contract.normalizer, text)
    prefixed = contract.space_prefix == "every" or (contract.space_prefix == "first" and start)
    return f" {text}" if prefixed and text and text[0] not in " ▁" else text


class GgufEngine:
    """A GGUF file in llama.cpp: the ``Engine`` and the ``Tokenizer`` protocol. KV cache in fp16, flash attention where
    llama.cpp has it; the last ``gpu_layers`` layers on ``gpus``."""

    def __init__(
        self, path: Path, contract: Contract, threads: int, gpus: Sequence[Gpu] = (), gpu_layers: int = 0
    ) -> None:
        self._lib = runtime()
        self._contract = contract
        self._model = load_model(path, gpus=gpus, gpu_layers=gpu_layers)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._vocab_size: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self._special = set((contract.special_ids or {}).values())
        try:
            check_contract(path, contract, self._vocab_size, self._lib.llama_model_n_ctx_train(self._model))
            if self._lib.llama_vocab_get_add_bos(self._vocab) != contract.add_bos:
                raise BadArtifact(f"{path} and the manifest do not agree on BOS.", "Export the artifact again.")
        except BadArtifact:
            self._lib.llama_model_free(self._model)
            raise
        params = self._lib.llama_context_default_params()
        params.n_ctx = contract.context_length
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            self._lib.llama_model_free(self._model)
            raise EdgekdError(
                f"{path}: llama.cpp makes no context of {contract.context_length} tokens: {said()}.",
                "Free memory, or export with a smaller context.",
            )
        self._memory = self._lib.llama_get_memory(self._context)
        self._one = (self._lib.llama_token * 1)()
        self._one_batch = self._lib.llama_batch_get_one(self._one, 1)
        self._logits_address = 0
        self._logits = np.empty(0, np.float32)

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a text, brought to the contract's normal form first."""
        return tokenize(self._lib, self._vocab, as_llama_cpp_reads(text, self._contract, start=start))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; nothing for a special one, by the contract: llama.cpp takes some for special by their
        text."""
        size, shown = 64, token not in self._special
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, shown)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def reset(self) -> None:
        """Empty the cache."""
        self._lib.llama_memory_clear(self._memory, False)

    def rewind(self, length: int) -> bool:
        """Drop what is behind; a cache that has let go of its beginning, as a window's may, has not what is before."""
        first: int = self._lib.llama_memory_seq_pos_min(self._memory, 0)
        return first == 0 and bool(self._lib.llama_memory_seq_rm(self._memory, 0, length, -1))

    def feed(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids, behind those that llama.cpp counts itself; logits of the last."""
        if len(ids) == 1:
            self._one[0] = ids[0]
            self._decode(self._one_batch, 1)
        else:
            tokens = (self._lib.llama_token * len(ids))(*ids)
            self._decode(self._lib.llama_batch_get_one(tokens, len(ids)), len(ids))
        return self._last_logits()

    def close(self) -> None:
        """Free llama.cpp's memory."""
        self._logits_address, self._logits = 0, np.empty(0, np.float32)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def _decode(self, batch: Any, count: int) -> None:
        if status := self._lib.llama_decode(self._context, batch):
            raise EdgekdError(f"llama.cpp failed to decode {count} tokens (status {status}): {said()}.")

    def _last_logits(self) -> np.ndarray:
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        address = ctypes.addressof(pointer.contents)
        if address != self._logits_address:  # making a view costs microseconds, and llama.cpp rarely moves the logits
            self._logits_address = address
            self._logits = np.ctypeslib.as_array(pointer, (self._vocab_size,))
            self._logits.flags.writeable = False
        return self._logits

    def feed_all(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids; logits of all."""
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i] = token
                batch.pos[i] = start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = 1
            self._decode(batch, len(ids))
        finally:
            self._lib.llama_batch_free(batch)
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (len(ids), self._vocab_size)).copy()

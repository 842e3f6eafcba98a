"""An ONNX decoder in onnxruntime: prefill and decode over a key-value cache that never moves.

onnxruntime itself, not onnxruntime-genai's generator: the generator gives the last position's logits alone, and is no
faster. Shapes: ``T`` tokens, ``V`` vocabulary, ``C`` context length. Logits are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadArtifact, EdgekdError, MissingExtra
from ..manifest import Contract
from ..session import check_ids, check_room, generate
from ._onnx_graph import DATA_FILE, HEAD_FILE, HIDDEN, POSITIONS
from ._tokenizer import JsonTokenizer

BATCH_TOKENS = 512
_LEAST_CAPACITY = 256
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def runtime() -> Any:
    """The ``onnxruntime`` module.

    Raises:
        MissingExtra: it is not installed.
        EdgekdError: it is installed but does not load.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtra("onnxruntime", "onnx") from error
    except ImportError as error:
        raise EdgekdError(f"onnxruntime does not load: {error}.", "Run: edgekd doctor") from error
    return onnxruntime


def choose_provider(wanted: Sequence[str]) -> str:
    """The first of these execution providers that this onnxruntime has.

    Raises:
        EdgekdError: it has none of them.
    """
    installed = runtime().get_available_providers()
    for name in wanted:
        if PROVIDERS[name] in installed:
            return name
    raise EdgekdError(
        f"the artifact is for {', '.join(wanted)}; this onnxruntime has {', '.join(installed)}.",
        "Install an onnxruntime with that execution provider, or export with cpu among providers.",
    )


def load(path: Path, provider: str, threads: int, *, light: bool = False) -> Any:
    """An ``InferenceSession``.

    Args:
        light: to be looked at, not run: types and shapes are compared, and weights stay on disk.

    Raises:
        BadArtifact: onnxruntime refuses the file.
    """
    lib = runtime()
    options = lib.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors come as exceptions
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # no slower, and less memory
    if light:
        options.graph_optimization_level = lib.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.strict_shape_type_inference", "1")
    try:
        return lib.InferenceSession(
            str(path), options, providers=list(dict.fromkeys([PROVIDERS[provider], "CPUExecutionProvider"]))
        )
    except Exception as error:  # its exceptions have no common parent but this
        reason = " ".join(str(error).split())[:300]
        raise BadArtifact(f"{path}: onnxruntime does not load it: {reason}.", "Export the artifact again.") from error


def genai_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """Text → ids by onnxruntime-genai.

    Raises:
        MissingExtra: it is not installed.
        EdgekdError: it refuses the tokenizer.
    """
    try:
        import onnxruntime_genai
    except ModuleNotFoundError as error:
        raise MissingExtra("onnxruntime-genai", "onnx") from error
    try:
        tokenizer = onnxruntime_genai.Tokenizer(str(folder))
    except Exception as error:  # RuntimeError, or what its reader of JSON throws
        raise EdgekdError(f"{folder}: onnxruntime-genai refuses the tokenizer: {error}.") from error
    return lambda text: [int(token) for token in tokenizer.encode(text)]


class OnnxSession:
    """An ONNX decoder: the ``Session`` protocol."""

    def __init__(self, path: Path, contract: Contract, details: Mapping[str, Any], threads: int) -> None:
        data = path.with_name(DATA_FILE)
        size = data.stat().st_size if data.is_file() else -1
        if size != details["data_bytes"]:
            what = f"has {size} bytes, not {details['data_bytes']}" if size >= 0 else "is missing"
            raise BadArtifact(f"{data} {what}.", "Export the artifact again.")
        self._provider = choose_provider(list(details["providers"]))
        self._folder, self._contract, self._details = path.parent, contract, details
        self._threads = threads
        self._session: Any = load(path, self._provider, threads)
        self._start()

    def _start(self) -> None:
        """Bind what stays the same from call to call."""
        lib, context = runtime(), self._contract.context_length
        self._many, self._one = self._session.io_binding(), self._session.io_binding()
        self._wants_positions = any(node.name == POSITIONS for node in self._session.get_inputs())
        self._capacity = 0
        self._arrays: dict[str, np.ndarray] = {}
        self._present: dict[str, Any] = {}
        logits = self._session.get_outputs()[0]
        self._logits = np.empty((1, 1, self.vocab_size), _NUMPY[logits.type])
        self._token = np.zeros((1, 1), np.int64)
        self._mask = np.ones((1, context), np.int64)
        self._one.bind_cpu_input("input_ids", self._token)
        self._one.bind_ortvalue_output("logits", lib.OrtValue.ortvalue_from_numpy(self._logits))
        self._used = 0

    def _reserve(self, count: int) -> None:
        """Make the cache hold ``count`` tokens. On the CPU it doubles, so that short chats take little memory; its
        arrays are NumPy's, which asks for huge pages: 6 % faster decoding behind 1,024 tokens of a 0.5B model."""
        if count <= self._capacity:
            return
        lib, context, grows = runtime(), self._contract.context_length, self._provider == "cpu"
        self._capacity = min(context, max(_LEAST_CAPACITY, 2 ** (count - 1).bit_length())) if grows else context
        for node in self._session.get_inputs():
            if not node.name.startswith("past_key_values"):
                continue
            shape, dtype = [1, node.shape[1], self._capacity, node.shape[3]], _NUMPY[node.type]
            present = node.name.replace("past_key_values", "present")
            if grows:
                grown = np.zeros(shape, dtype)
                if present in self._arrays:
                    grown[:, :, : self._used] = self._arrays[present][:, :, : self._used]
                self._arrays[present] = grown
                cache = lib.OrtValue.ortvalue_from_numpy(grown)
            else:
                cache = lib.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._provider)
            self._present[present] = cache  # one buffer, written in place
            for binding in (self._many, self._one):
                binding.bind_ortvalue_input(node.name, cache)
            self._one.bind_ortvalue_output(present, cache)

    @property
    def vocab_size(self) -> int:
        """Length ``V`` of the logits."""
        return self._contract.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens the cache holds."""
        return self._contract.context_length

    @cached_property
    def _json(self) -> JsonTokenizer:
        return JsonTokenizer(self._folder / "tokenizer.json", "onnx")

    @cached_property
    def _head(self) -> Any:
        return load(self._folder / HEAD_FILE, self._provider, self._threads)

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        if self._details["tokenizer"]["used"] == "onnxruntime-genai":
            return genai_tokenizer(self._folder)
        return self._json.tokenize

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text: by onnxruntime-genai where its ids were proved at export, else by ``tokenizer.json``."""
        self._check_open()
        return self._encode(text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; nothing for a special one."""
        self._check_open()
        check_ids([token], self.vocab_size)
        return self._json.token_bytes(token)

    def reset(self) -> None:
        """Empty the cache."""
        self._check_open()
        self._used = 0

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """Append ids; logits of the last ``(V,)``, or of all ``(T, V)``."""
        if not len(ids):
            raise ValueError("no ids to prefill")
        check_ids(ids, self.vocab_size)
        self._check_room(len(ids))
        pieces = [ids[i : i + BATCH_TOKENS] for i in range(0, len(ids), BATCH_TOKENS)]
        if all_logits:
            return np.concatenate(
                [self._head.run(None, {HIDDEN: self._feed(piece, HIDDEN)})[0][0] for piece in pieces]
            ).astype(np.float32)
        for piece in pieces:
            logits = self._feed(piece, "logits")
        return logits[0, 0].astype(np.float32)

    def _feed(self, ids: Sequence[int], output: str) -> np.ndarray:
        """Append a piece and return one of the graph's outputs."""
        self._reserve(self._used + len(ids))
        self._many.bind_cpu_input("input_ids", np.asarray(ids, np.int64)[None])
        self._many.clear_binding_outputs()
        for name, cache in self._present.items():
            self._many.bind_ortvalue_output(name, cache)
        self._many.bind_output(output)
        self._run(self._many, len(ids))
        return self._many.get_outputs()[-1].numpy()

    def decode(self, token: int) -> np.ndarray:
        """Append one id; its logits ``(V,)``."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        self._check_room(1)
        self._token[0, 0] = token
        self._reserve(self._used + 1)
        self._run(self._one, 1)
        return np.asarray(self._logits[0, 0], np.float32)  # no copy where they are float32

    def _run(self, binding: Any, count: int) -> None:
        """Run ``count`` tokens that the cache has room for."""
        binding.bind_cpu_input("attention_mask", self._mask[:, : self._used + count])
        if self._wants_positions:
            binding.bind_cpu_input(POSITIONS, np.arange(self._used, self._used + count)[None])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # its exceptions have no common parent but this
            reason = " ".join(str(error).split())[:300]
            raise EdgekdError(f"onnxruntime failed on {count} tokens: {reason}.") from error
        self._used += count

    def generate(
        self, ids: Sequence[int], max_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Yield new tokens until an end-of-sequence token, ``max_tokens``, or a full cache."""
        return generate(self, self._contract.eos_ids, ids, max_tokens, temperature, seed)

    def close(self) -> None:
        """Free onnxruntime's memory."""
        self._session = self._many = self._one = None
        self._arrays, self._present = {}, {}
        self.__dict__.pop("_head", None)

    def _check_open(self) -> None:
        if self._session is None:
            raise ValueError("the session is closed")

    def _check_room(self, count: int) -> None:
        self._check_open()
        check_room(self._used, count, self.context_length)

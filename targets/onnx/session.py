"""An ONNX decoder in onnxruntime: a key-value cache that grows, and is written in place.

onnxruntime itself, not onnxruntime-genai's generator: the generator gives the last position's logits alone, and is no
faster. Shapes: ``T`` tokens, ``V`` vocabulary, ``C`` context length. Logits are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadArtifact, EdgekdError, MissingExtra
from ...manifest import MAX_TOKENS, Artifact, Contract
from ..shared.artifact import check_contract, check_installed
from ..shared.proto import messages
from .graph import COSINES, HIDDEN, POSITIONS

GENAI = "onnxruntime-genai"
_LEAST_CAPACITY = 256
_PAST = "past_key_values"
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
_BROUGHT_BY = {"cuda": "onnxruntime-gpu", "dml": "onnxruntime-directml"}
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
    onnxruntime.disable_telemetry_events()  # where the program that calls us had imported it before
    return onnxruntime


def choose_provider(wanted: Sequence[str]) -> str:
    """The first of these execution providers that this onnxruntime has.

    Raises:
        EdgekdError: it has none of them.
    """
    installed = runtime().get_available_providers()
    for name in wanted:
        if PROVIDERS.get(name) in installed:
            return name
    raise EdgekdError(
        f"the artifact is for {', '.join(wanted)}; this onnxruntime has {', '.join(installed)}.",
        f"Install {' or '.join(map(_package, wanted))} in place of onnxruntime, or export with cpu among providers.",
    )


def _package(provider: str) -> str:
    """The distribution that brings an execution provider."""
    return _BROUGHT_BY.get(provider, f"a build of onnxruntime with {PROVIDERS.get(provider, provider)}")


def gpu_providers() -> list[str]:
    """The execution providers of GPUs that this onnxruntime has."""
    installed = runtime().get_available_providers()
    return [name for name, provider in PROVIDERS.items() if name != "cpu" and provider in installed]


def load(path: Path, provider: str, threads: int, *, light: bool = False) -> Any:
    """An ``InferenceSession``.

    Args:
        light: to be looked at, not run: types and shapes are compared, and weights stay on disk.

    Raises:
        BadArtifact: onnxruntime refuses the file.
        EdgekdError: the execution provider does not start.
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
        session = lib.InferenceSession(
            str(path), options, providers=list(dict.fromkeys([PROVIDERS[provider], "CPUExecutionProvider"]))
        )
    except Exception as error:  # its exceptions have no common parent but this
        raise BadArtifact(
            f"{path}: onnxruntime does not load it: {_first_words(error)}.", "Export the artifact again."
        ) from error
    if PROVIDERS[provider] not in session.get_providers():  # it goes on with the CPU, and warns where nobody looks
        raise EdgekdError(
            f"{path}: onnxruntime does not start {PROVIDERS[provider]}: a driver or a library of it is missing.",
            "Install what it needs, or export with cpu alone among providers.",
        )
    return session


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def check_graph(path: Path, artifact: Artifact, context_length: int | None = None) -> None:
    """What onnxruntime does not check of a graph: every file that it names is the artifact's own.

    Args:
        context_length: for the decoder, whose table of the rotary embedding must be as long.

    Raises:
        BadArtifact: it is no graph, it names another file, or its table is shorter.
        MissingExtra: onnx is not installed.
    """
    check_installed("onnx", "onnx")
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, which differs between its implementations
        raise BadArtifact(f"{path} is no ONNX graph: {_first_words(error)}.", "Export the artifact again.") from error
    for tensor in messages(model, "TensorProto"):
        for entry in tensor.external_data:
            if entry.key == "location":
                artifact.path(entry.value)
    if context_length is not None:
        tables = [tensor for tensor in model.graph.initializer if tensor.name == COSINES and tensor.dims]
        if not tables or min(tensor.dims[0] for tensor in tables) < context_length:
            raise BadArtifact(
                f"{path} has no table of the rotary embedding for a context of {context_length}.",
                "Export the artifact again.",
            )


def _check_nodes(path: Path, inputs: Sequence[Any], outputs: Mapping[str, object]) -> None:
    """Refuse a graph that is not a decoder with a cache, by its inputs and outputs.

    Raises:
        BadArtifact: names what is wrong.
    """

    def whole(node: Any, rank: int, *axes: int) -> bool:
        lengths = [node.shape[axis] for axis in axes] if len(node.shape) == rank else [0]
        return node.type in _NUMPY and all(isinstance(n, int) and 0 < n < MAX_TOKENS for n in lengths)

    caches = [node for node in inputs if node.name.startswith(_PAST)]
    other = {node.name for node in inputs} - {node.name for node in caches}
    if not {"input_ids", "attention_mask"} <= other <= {"input_ids", "attention_mask", POSITIONS}:
        what = f"takes {sorted(other)}"
    elif wrong := [node.name for node in caches if not whole(node, 4, 1, 3) or _present(node.name) not in outputs]:
        what = f"keeps no such cache as {wrong[0]!r}"
    elif "logits" not in outputs or HIDDEN not in outputs or not whole(outputs["logits"], 3, 2):
        what = f"gives no logits of a fixed vocabulary, but {sorted(outputs)}"
    else:
        return
    raise BadArtifact(f"{path} is no decoder of this target: it {what:.300}.", "Export the artifact again.")


def _present(past: str) -> str:
    """The output that continues a cache."""
    return past.replace(_PAST, "present", 1)


def genai_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """Text → ids by onnxruntime-genai.

    Raises:
        MissingExtra: it is not installed.
        EdgekdError: it refuses the tokenizer.
    """
    try:
        import onnxruntime_genai
    except ModuleNotFoundError as error:
        raise MissingExtra(GENAI, "onnx") from error
    onnxruntime_genai.disable_telemetry_events()
    try:
        tokenizer = onnxruntime_genai.Tokenizer(str(folder))
    except Exception as error:  # RuntimeError, or what its reader of JSON throws
        raise EdgekdError(f"{folder}: onnxruntime-genai refuses the tokenizer: {error}.") from error
    return lambda text: [int(token) for token in tokenizer.encode(text)]


class OnnxEngine:
    """An ONNX decoder: the ``Engine`` protocol."""

    def __init__(self, path: Path, head: Path, contract: Contract, provider: str, threads: int) -> None:
        self._path, self._head_path, self._provider, self._threads = path, head, provider, threads
        self._context = contract.context_length
        self._session: Any = load(path, provider, threads)
        self._start(contract)

    def _start(self, contract: Contract) -> None:
        """Bind what stays the same from call to call.

        Raises:
            BadArtifact: the graph is not such a decoder's.
        """
        lib = runtime()
        outputs = {node.name: node for node in self._session.get_outputs()}
        _check_nodes(self._path, self._session.get_inputs(), outputs)
        logits = outputs["logits"]
        check_contract(self._path, contract, logits.shape[2], self._context)
        self._many, self._one = self._session.io_binding(), self._session.io_binding()
        self._wants_positions = any(node.name == POSITIONS for node in self._session.get_inputs())
        self._capacity = 0
        self._arrays: dict[str, np.ndarray] = {}
        self._present: dict[str, object] = {}
        self._logits = np.empty((1, 1, logits.shape[2]), _NUMPY[logits.type])
        self._token = np.zeros((1, 1), np.int64)
        self._mask = np.ones((1, self._context), np.int64)
        self._one.bind_cpu_input("input_ids", self._token)
        self._one.bind_ortvalue_output("logits", lib.OrtValue.ortvalue_from_numpy(self._logits))

    def _reserve(self, used: int, count: int) -> None:
        """Make the cache, which holds ``used`` tokens, hold ``count`` more. On the CPU it doubles, so that short chats
        take little memory; its arrays are NumPy's, which asks for huge pages: 6 % faster decoding behind 1,024 tokens
        of a 0.5B model."""
        wanted = used + count
        if wanted <= self._capacity:
            return
        lib, grows = runtime(), self._provider == "cpu"
        doubled = max(_LEAST_CAPACITY, 2 ** (wanted - 1).bit_length())
        self._capacity = min(self._context, doubled) if grows else self._context
        for node in self._session.get_inputs():
            if not node.name.startswith(_PAST):
                continue
            shape, dtype = [1, node.shape[1], self._capacity, node.shape[3]], _NUMPY[node.type]
            present = _present(node.name)
            if grows:
                grown = np.zeros(shape, dtype)
                if present in self._arrays:
                    grown[:, :, :used] = self._arrays[present][:, :, :used]
                self._arrays[present] = grown
                cache = lib.OrtValue.ortvalue_from_numpy(grown)
            else:
                cache = lib.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._provider)
            self._present[present] = cache  # one buffer, written in place
            for binding in (self._many, self._one):
                binding.bind_ortvalue_input(node.name, cache)
            self._one.bind_ortvalue_output(present, cache)

    @cached_property
    def _head(self) -> Any:
        return load(self._head_path, self._provider, self._threads)

    def feed(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids; logits of the last."""
        if len(ids) > 1:
            return self._outputs(ids, start, "logits")[0, 0].astype(np.float32)
        self._token[0, 0] = ids[0]
        self._reserve(start, 1)
        self._run(self._one, start, 1)
        return np.asarray(self._logits[0, 0], np.float32)  # no copy where they are float32

    def feed_all(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids; logits of all."""
        head, hidden = self._head, self._outputs(ids, start, HIDDEN)
        try:
            (logits,) = head.run(["logits"], {HIDDEN: hidden})
        except Exception as error:  # as above
            raise EdgekdError(f"{self._head_path}: onnxruntime failed: {_first_words(error)}.") from error
        return logits[0].astype(np.float32)

    def _outputs(self, ids: Sequence[int], start: int, output: str) -> np.ndarray:
        """Write ids and return one of the graph's outputs."""
        self._reserve(start, len(ids))
        self._many.bind_cpu_input("input_ids", np.asarray(ids, np.int64)[None])
        self._many.clear_binding_outputs()
        for name, cache in self._present.items():
            self._many.bind_ortvalue_output(name, cache)
        self._many.bind_output(output)
        self._run(self._many, start, len(ids))
        return self._many.get_outputs()[-1].numpy()

    def _run(self, binding: Any, start: int, count: int) -> None:
        """Run ``count`` tokens that the cache has room for."""
        binding.bind_cpu_input("attention_mask", self._mask[:, : start + count])
        if self._wants_positions:
            binding.bind_cpu_input(POSITIONS, np.arange(start, start + count)[None])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # its exceptions have no common parent but this
            raise EdgekdError(f"onnxruntime failed on {count} tokens: {_first_words(error)}.") from error

    def reset(self) -> None:
        """What is cached is written over."""

    def rewind(self, length: int) -> bool:
        """What is behind is written over."""
        return True

    def close(self) -> None:
        """Free onnxruntime's memory."""
        self._session = self._many = self._one = None
        self._arrays, self._present = {}, {}
        self.__dict__.pop("_head", None)

"""GGUF for llama.cpp: fp16 and the portable grid (Q8_0, Q4_0) packed here; native types by its own quantizer."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ...architecture import Architecture
from ...checkpoint import Checkpoint
from ...errors import EdgekdError, Unsupported
from ...manifest import Artifact
from ...proof import SOFTWARE_GPU
from ...session import Arithmetic, Session
from ...student import load_tokenizer
from ..shared.artifact import (
    Details,
    Job,
    TokenizerProof,
    Written,
    build_artifact,
    check_installed,
    cores,
    details_of,
    main_file,
)
from ..shared.decoder import asked_for
from ..shared.session import DecoderSession
from ..shared.source import plain_form
from ..shared.target import TargetOptions
from ..shared.tokenizer import compare_ids
from . import names as arch_
from . import vocab as vocab_
from .gpu import Gpu, check_room, names, need_gpus
from .gpu import gpus as found_gpus
from .install import explain_crash, install
from .selftest import self_test
from .session import GgufEngine, as_llama_cpp_reads, load_model, runtime, said, tokenize

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

    from ...quant.recipe import Recipe

__all__ = [
    "EXTRA",
    "FEATURES",
    "PACKAGES",
    "TITLE",
    "Options",
    "build_flags",
    "check",
    "describe_gpus",
    "explain_crash",
    "export",
    "gpu",
    "install",
    "open",
    "self_test",
    "stand_in",
]

TITLE, EXTRA = "GGUF", "gguf"
PACKAGES = ("llama-cpp-python", "gguf")
FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2, "q4_k_s": 14, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25}
"""llama.h: llama_ftype."""
MAIN_FILE = "model.gguf"
FEATURES = arch_.FEATURES
_CACHE_BYTES = 2  # llama.cpp's cache is float16 unless told otherwise


class Options(TargetOptions):
    """A GGUF target."""

    gpu_layers: Annotated[int, Field(ge=0, le=2**12)] = Field(
        0,
        description="Layers that llama.cpp computes on a GPU when the artifact is opened, counted from the last, the "
        "output among them; more than there are: all. 0: the CPU alone.",
    )


def arithmetic(recipe: Recipe, asked: Mapping[str, object]) -> Arithmetic:
    """llama.cpp rounds the inputs of quantized matrices to 8 bits in blocks of 32, those of others to fp16; on a GPU it
    adds up in fp16 too."""
    if recipe.on_grid or recipe.native:
        return "int8 by 32"
    return "float16 sums" if _gpu_layers(asked) else "float16"


class GgufDetails(Details):
    """What a GGUF artifact has to say."""

    tokenizer: TokenizerProof
    """How llama.cpp reads whole texts by itself, special tokens parsed; sessions place these themselves."""
    gpu_layers: int = Field(0, ge=0)
    """The last ones, which sessions compute on a GPU."""
    layers: int = Field(0, ge=0)
    """Those that could be, the output among them; 0: an artifact of an earlier version."""


def check(config: Mapping[str, object], tokenizer_folder: Path, spec: Options) -> None:
    """Refuse what GGUF cannot hold, from ``config.json`` and ``tokenizer.json`` alone.

    Raises:
        SpecError: an unknown recipe, or a context longer than the student's.
        Unsupported: an architecture, setting or tokenizer that the exporter does not write.
        MissingExtra: gguf or llama-cpp-python is not installed.
        NoGpu: layers for a GPU that llama.cpp does not have here.
    """
    arch, context_length = asked_for(config, spec)
    arch_.check(arch, context_length)
    vocab_.check_tokenizer(tokenizer_folder)
    check_installed("gguf", "gguf")
    if spec.gpu_layers:
        need_gpus(gpus(), f"targets: gpu_layers {spec.gpu_layers}")
    runtime()
    if not (tokenizer_folder / "tokenizer.json").is_file():
        _try_tokenizer(arch, tokenizer_folder)


def _try_tokenizer(arch: Architecture, folder: Path) -> None:
    """Whether llama.cpp gives the ids of a tokenizer that transformers makes of ``tokenizer.model`` shows in use."""
    tokenizer = load_tokenizer(folder)
    vocabulary = vocab_.read_tokenizer(tokenizer, folder, arch.vocab_size)
    with TemporaryDirectory() as scratch:
        bare = partial(_writer, arch, arch.context_length, vocabulary, name=folder.name, file_type=None)
        _prove(bare, vocabulary, tokenizer, arch.context_length, Path(scratch) / "vocabulary.gguf")


def export(
    student: Path,
    spec: Options,
    recipe: str,
    out_dir: Path,
    *,
    name: str,
    quantized: Path | None = None,
    moments: Path | None = None,
) -> Artifact:
    """Write ``model.gguf``, the tokenizer and the manifest; see ``targets.export``.

    The tokenizer's ids are proved against llama.cpp before any weight is written.
    """
    check(Checkpoint(student).config, student, spec.model_copy(update={"recipes": [recipe]}))
    return build_artifact(
        student,
        spec,
        recipe,
        out_dir,
        quantized,
        lambda job: _write(job, spec, moments),
        name=name,
        title=TITLE,
        packages=PACKAGES,
        runtime="llama.cpp",
        main_file=MAIN_FILE,
    )


def open(artifact: Artifact, *, threads: int | None = None) -> Session:
    """The artifact in llama.cpp, with as many layers on a GPU as it was exported for.

    Raises:
        BadArtifact: llama.cpp refuses the file.
        NoGpu: there is none for its layers.
        EdgekdError: there is too little memory on it.
        MissingExtra: llama-cpp-python is not installed.
    """
    contract, traffic = artifact.manifest.contract, artifact.manifest.traffic
    path, layers, found = main_file(artifact, MAIN_FILE), 0, []
    if _gpu_layers(artifact.manifest.details or {}):
        details, found = details_of(artifact, GgufDetails), gpus()
        layers, what = details.gpu_layers, f"{artifact.folder}: gpu_layers {details.gpu_layers}"
        need_gpus(found, what)
        if traffic and details.layers:
            check_room(found, layers, details.layers, round(traffic.bytes_per_token(contract.context_length)), what)
    engine = GgufEngine(path, contract, cores(threads), found, layers)
    return DecoderSession(engine, engine, contract)


def _gpu_layers(asked: Mapping[str, object]) -> bool:
    """Whether a section of the spec, or what a manifest says of it, wants layers on a GPU."""
    return asked.get("gpu_layers", 0) != 0


def gpus() -> list[Gpu]:
    """Those of this llama.cpp."""
    runtime()
    return found_gpus()


def gpu(asked: Mapping[str, object]) -> str | None:
    """What computes the layers that are not the CPU's."""
    if not _gpu_layers(asked) or not (found := gpus()):
        return None
    return f"{asked['gpu_layers']} layers on {names(found)}"


def stand_in(asked: Mapping[str, object]) -> str | None:
    """The software that does a GPU's work here, where layers are to be on one."""
    slow = [found.name for found in gpus() if found.software] if _gpu_layers(asked) else []
    return f"{slow[0].partition(' (')[0]}, {SOFTWARE_GPU}" if slow else None


def describe_gpus() -> str:
    """The GPUs of this llama.cpp.

    Raises:
        NoGpu: there is none; how to get one.
    """
    found = gpus()
    need_gpus(found, "llama.cpp")
    return names(found) + f": {SOFTWARE_GPU}" * any(gpu.software for gpu in found)


def build_flags() -> str:
    """The instructions that llama.cpp was built for."""
    parts = runtime().llama_print_system_info().decode().replace(":", "|").split("|")
    return " ".join(name.strip() for name, _, value in (part.partition("=") for part in parts) if value.strip() == "1")


def cache_value_bytes(spec: Options) -> int:
    """Of a number in the cache, float16."""
    return _CACHE_BYTES


def _write(job: Job, spec: Options, moments: Path | None) -> Written:
    """Write everything but the manifest."""
    from .pack import write_file

    checkpoint, recipe, folder = job.checkpoint, job.recipe, job.folder
    arch = checkpoint.architecture
    plan = arch_.weights(arch, job.source)
    source, _ = plain_form(job.source, arch, split=False)  # of fused matrices, llama.cpp's are fused too
    tokenizer = load_tokenizer(checkpoint.folder)
    vocabulary = vocab_.read_tokenizer(tokenizer, checkpoint.folder, arch.vocab_size)
    context_length = spec.context_of(arch.context_length)

    def writer(pre: str, file_type: int | None = None) -> GGUFWriter:
        return _writer(arch, context_length, vocabulary, pre, job.name, file_type)

    pre, habits = _prove(writer, vocabulary, tokenizer, context_length, folder / "vocabulary.gguf")
    path = folder / MAIN_FILE
    packed = folder / "f16.gguf" if recipe.native else path
    file_type = "q4_0" if recipe.has_int4 else "q8_0" if recipe.on_grid else "f16"
    write_file(
        writer(pre, FILE_TYPES[file_type]), packed, plan, source, vectors=arch_.rope_tensors(arch, context_length)
    )
    if recipe.native:
        importance = _importance(plan, checkpoint, moments) if recipe.needs_moments else {}
        _quantize(packed, path, FILE_TYPES[recipe.native.type], importance)
        packed.unlink()
    tokenizer.save_pretrained(folder)
    sizes = _tensor_bytes(path)
    return Written(
        contract=vocab_.contract(vocabulary, context_length),
        weight_bytes=sum(sizes.values()),
        table_bytes=0 if arch.tied else sizes["token_embd.weight"],
        cache_value_bytes=_CACHE_BYTES,
        details=GgufDetails(tokenizer=habits, gpu_layers=min(spec.gpu_layers, arch.layers + 1), layers=arch.layers + 1),
    )


def _writer(
    arch: Architecture,
    context_length: int,
    vocabulary: vocab_.Vocabulary,
    pre: str,
    name: str,
    file_type: int | None,
) -> GGUFWriter:
    """A writer with all keys set; ``file_type`` None: of a file without weights."""
    import gguf

    writer = gguf.GGUFWriter(None, arch_.runtime_of(arch))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    arch_.add_hyperparameters(writer, arch, context_length)
    if file_type is not None:
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocab_.add_vocabulary(writer, vocabulary, pre)
    return writer


def _prove(
    writer: Any, vocabulary: vocab_.Vocabulary, tokenizer: Any, context_length: int, path: Path
) -> tuple[str, TokenizerProof]:
    """The pre-tokenizer's name, proved with llama.cpp on a file without weights that is removed again, and how it reads
    whole texts by itself: special tokens parsed, BOS and EOS added."""
    lib = runtime()
    contract = vocab_.contract(vocabulary, context_length)
    bare = writer(vocabulary.pre)
    bare.write_header_to_file(path)
    bare.write_kv_data_to_file()
    bare.write_ti_data_to_file()
    bare.close()

    def runtime_ids(pre: str, texts: Iterable[str], *, whole: bool = False) -> list[list[int]]:
        model = load_model(path, vocab_only=True, pre_tokenizer=pre)
        try:
            vocab = lib.llama_model_get_vocab(model)
            given = texts if whole else (as_llama_cpp_reads(text, contract) for text in texts)
            return [tokenize(lib, vocab, text, whole=whole) for text in given]
        finally:
            lib.llama_model_free(model)

    try:
        pre = vocab_.prove_tokenizer(vocabulary, tokenizer, runtime_ids)
        texts = vocab_.probe_texts(vocabulary, tokenizer)
        return pre, compare_ids(tokenizer, "llama.cpp", texts, runtime_ids(pre, texts, whole=True))
    finally:
        path.unlink()


def _importance(plan: list[arch_.Weight], checkpoint: Checkpoint, moments: Path | None) -> dict[str, np.ndarray]:
    """llama.cpp's importance matrix: the mean square of every input, float32 ``(in,)``, by GGUF tensor name.

    Raises:
        EdgekdError: no moments, or those of another student.
    """
    import numpy as np
    from safetensors.numpy import load_file

    if moments is None:
        raise EdgekdError("this recipe needs the activations' second moments.", "Give calibration text.")
    found = load_file(moments)
    importance = {}
    for weight in plan:
        if weight.source not in found:
            continue
        # llama.cpp refuses zeros: an input that never moved matters least, not nothing.
        values = np.maximum(found[weight.source], np.finfo(np.float32).tiny)
        if values.shape != (weight.shape[-1],):
            raise EdgekdError(
                f"{moments}: {weight.source!r} has {values.size} moments for {weight.shape[-1]} inputs.",
                f"Calibrate {checkpoint.folder} itself.",
            )
        importance[weight.name] = values
    return importance


def _quantize(source: Path, target: Path, file_type: int, importance: Mapping[str, np.ndarray]) -> None:
    lib = runtime()
    params = lib.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = cores()
    entries = (lib.llama_model_imatrix_data * (len(importance) + 1))()  # the last, empty one ends the list
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    if importance:
        params.imatrix = entries
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise Unsupported(f"llama.cpp cannot quantize this student: {said()}.", "Use portable-int4 or int8.")


def _tensor_bytes(path: Path) -> dict[str, int]:
    """Size of every tensor."""
    import gguf

    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}

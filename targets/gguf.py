"""GGUF for llama.cpp: F16, Q8_0 and the portable grid as Q4_0 packed here; K-quants by llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..errors import EdgekdError, MissingExtra, SpecError, Unsupported
from ..manifest import Artifact
from ..spec import TargetSpec
from ..student import Checkpoint, load_tokenizer
from . import _gguf_arch as arch_
from . import _gguf_vocab as vocab_
from ._common import build_artifact
from ._decoder import check_context
from ._gguf_session import GgufSession, load_model, runtime, said, tokenize

if TYPE_CHECKING:
    from gguf import GGUFWriter

PACKED = {"f16": 1, "q8_0": 7, "q4_0": 2}  # recipe → llama.cpp's file type
K_QUANTS = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
RECIPES = (*PACKED, *K_QUANTS)
MAIN_FILE = "model.gguf"


def check(config: Mapping[str, Any], tokenizer_folder: Path, spec: TargetSpec) -> None:
    """Refuse what GGUF cannot hold, from ``config.json`` and ``tokenizer.json`` alone.

    Raises:
        SpecError: an unknown recipe, or a context longer than the student's.
        Unsupported: an architecture, setting or tokenizer that the exporter does not write.
        MissingExtra: gguf or llama-cpp-python is not installed.
    """
    for recipe in spec.recipes:
        if recipe not in RECIPES:
            raise SpecError(f"targets: gguf has no recipe {recipe!r}; there are: {', '.join(RECIPES)}.")
    arch = arch_.read_config(config)
    check_context(spec, arch)
    vocab_.check_tokenizer(tokenizer_folder)
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("gguf", "gguf") from error
    runtime()


def export(
    student: Path, spec: TargetSpec, recipe: str, out_dir: Path, *, name: str, grid: Path | None = None
) -> Artifact:
    """Write ``model.gguf``, the tokenizer and the manifest; see ``targets.export``.

    The tokenizer's ids are proved against llama.cpp before any weight is written. ``grid`` concerns ``q4_0`` alone.
    """
    checkpoint = Checkpoint(student)
    check(checkpoint.config, student, spec.model_copy(update={"recipes": [recipe]}))

    def fill(folder: Path) -> dict[str, Any]:
        fields = _write(checkpoint, spec, recipe, folder, name, grid if recipe == "q4_0" else None)
        return {"name": name, "target": "gguf", "recipe": recipe, "main_file": MAIN_FILE} | fields

    return build_artifact(out_dir, fill)


def open(artifact: Artifact, *, threads: int | None = None) -> GgufSession:
    """The artifact in llama.cpp.

    Raises:
        BadArtifact: llama.cpp refuses the file.
        MissingExtra: llama-cpp-python is not installed.
    """
    cores = threads or psutil.cpu_count(logical=False) or 1
    return GgufSession(artifact.main_file, artifact.manifest.contract, cores)


def _write(
    checkpoint: Checkpoint, spec: TargetSpec, recipe: str, folder: Path, name: str, grid_folder: Path | None
) -> dict[str, Any]:
    """Write everything but the manifest, and return the manifest's fields."""
    from ..quant.folder import open_grid
    from ._gguf_pack import write_file

    arch = arch_.read_config(checkpoint.config)
    plan = arch_.weights(arch, checkpoint)
    grid = open_grid(grid_folder) if grid_folder is not None else None
    if grid is not None and grid.student_digest != checkpoint.digest:
        raise EdgekdError(f"{grid_folder} was quantized from another student.", "Quantize this one.")
    tokenizer = load_tokenizer(checkpoint.folder)
    vocabulary = vocab_.read_tokenizer(tokenizer, checkpoint.folder, arch.vocab_size)
    context_length = spec.context or arch.context_length

    def writer(pre: str, file_type: int | None = None) -> GGUFWriter:
        return _writer(arch, context_length, vocabulary, pre, name, file_type)

    pre = _prove(writer, vocabulary, tokenizer, folder / "vocabulary.gguf")
    main_file = folder / MAIN_FILE
    if recipe in PACKED:
        write_file(
            writer(pre, PACKED[recipe]), main_file, plan, recipe, checkpoint, rope_factors=arch.rope_factors, grid=grid
        )
    else:
        half = folder / "f16.gguf"
        write_file(writer(pre, PACKED["f16"]), half, plan, "f16", checkpoint, rope_factors=arch.rope_factors)
        _quantize(half, main_file, K_QUANTS[recipe])
        half.unlink()
    tokenizer.save_pretrained(folder)
    return {
        "runtime": "llama.cpp",
        "student_digest": checkpoint.digest,
        "grid_digest": grid.digest if grid is not None else None,
        "parameters": checkpoint.parameters,
        "bits_per_weight": round(8 * _tensor_bytes(main_file) / checkpoint.parameters, 4),
        "contract": vocab_.contract(vocabulary, context_length),
        "versions": {package: version(package) for package in ("edgekd", "llama-cpp-python", "gguf")},
    }


def _writer(
    arch: arch_.Architecture,
    context_length: int,
    vocabulary: vocab_.Vocabulary,
    pre: str,
    name: str,
    file_type: int | None,
) -> GGUFWriter:
    """A writer with all keys set; ``file_type`` None: of a file without weights."""
    import gguf

    writer = gguf.GGUFWriter(None, arch.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    arch_.add_hyperparameters(writer, arch, context_length)
    if file_type is not None:
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocab_.add_vocabulary(writer, vocabulary, pre)
    return writer


def _prove(writer: Any, vocabulary: vocab_.Vocabulary, tokenizer: Any, path: Path) -> str:
    """The pre-tokenizer's name, proved with llama.cpp on a file without weights that is removed again."""
    lib = runtime()
    bare = writer(vocabulary.pre)
    bare.write_header_to_file(path)
    bare.write_kv_data_to_file()
    bare.write_ti_data_to_file()
    bare.close()

    def runtime_ids(pre: str, texts: Iterable[str]) -> list[list[int]]:
        model = load_model(path, vocab_only=True, pre_tokenizer=pre)
        try:
            vocab = lib.llama_model_get_vocab(model)
            return [tokenize(lib, vocab, text) for text in texts]
        finally:
            lib.llama_model_free(model)

    try:
        return vocab_.prove_tokenizer(vocabulary, tokenizer, runtime_ids)
    finally:
        path.unlink()


def _quantize(source: Path, target: Path, file_type: int) -> None:
    lib = runtime()
    params = lib.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = psutil.cpu_count(logical=False) or 1
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise Unsupported(f"llama.cpp cannot quantize this student: {said()}.", "Use the recipe q4_0 or q8_0.")


def _tensor_bytes(path: Path) -> int:
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)

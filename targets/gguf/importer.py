"""A model folder of a GGUF file, and what the file itself gives in llama.cpp, to prove it by.

The file is a stranger's: it is read in a process of its own first.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from ...architecture import read_architecture
from ...checkpoint import Checkpoint
from ...errors import EdgekdError, Unsupported
from ...files import digest, file_sha256
from ...manifest import Contract
from ...session import Session
from ...student import load_tokenizer
from ...trial import try_once
from ..shared.artifact import cores
from ..shared.session import DecoderSession
from .file import GgufFile
from .foreign import read_config, weights_of, write_weights
from .foreign_tokenizer import write_tokenizer
from .session import GgufEngine, load_model, runtime, said
from .vocab import contract, read_tokenizer


def try_file(path: Path) -> str:
    """Read a GGUF file in a process of its own, unless that was done already; its sha256.

    Raises:
        EdgekdError: it cannot be read, or the process died or hung.
    """
    if not path.is_file():
        raise EdgekdError(f"{path}: there is no such file.", "Name a GGUF file.")
    sha256 = file_sha256(path)
    try_once(digest(["gguf", sha256]), f"{__name__}:run_trial", path.absolute(), path.stat().st_size, EdgekdError)
    return sha256


def run_trial(path: Path) -> None:
    """What ``try_file`` runs: our reader on every key and tensor, and llama.cpp's.

    Raises:
        EdgekdError: as ``write_folder``.
    """
    file = GgufFile(path)
    for weight in weights_of(file, read_architecture(read_config(file), str(path))):
        file.tensor(weight.name)
    runtime().llama_model_free(load_model(path))


def write_folder(path: Path, folder: Path) -> tuple[GgufFile, int]:
    """Write configuration, tokenizer and weights; the file, and the number of texts that its ids were proved on.

    Raises:
        EdgekdError: the file is damaged, or not whole.
        Unsupported: an architecture, feature, tokenizer or quantization that is not read.
    """
    file = GgufFile(path)
    config = read_config(file)
    weights = weights_of(file, read_architecture(config, str(path)))
    texts = write_tokenizer(file, config, folder)
    write_weights(file, weights, folder)
    return file, texts


def open_dequantized(path: Path, folder: Path, scratch: Path, context_length: int) -> Session:
    """The file in llama.cpp in full precision: its weights dequantized by llama.cpp itself.

    Args:
        folder: the model folder made of it.
        scratch: a file to make for that; it may be removed once the session is closed.

    Raises:
        Unsupported: llama.cpp cannot dequantize it.
    """
    lib = runtime()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = 0, True, cores()  # 0: all float32
    if lib.llama_model_quantize(str(path).encode(), str(scratch).encode(), ctypes.byref(params)):
        raise Unsupported(f"{path}: llama.cpp cannot dequantize it: {said()}.", "Take a file of another quantization.")
    used = _contract(folder, context_length)
    engine = GgufEngine(scratch, used, cores())
    return DecoderSession(engine, engine, used)


def _contract(folder: Path, context_length: int) -> Contract:
    rows = Checkpoint(folder).architecture.vocab_size
    return contract(read_tokenizer(load_tokenizer(folder), folder, rows), context_length)

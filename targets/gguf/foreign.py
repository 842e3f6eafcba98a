"""A GGUF file as a model folder: ``config.json`` from its keys, weights under transformers' names, tokenizer beside.

It is the way back of ``names``, ``pack`` and ``vocab``: the same tables, read from the other end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...architecture import FAMILIES, Architecture, read_architecture
from ...checkpoint import INDEX_FILE
from ...errors import EdgekdError, Unsupported
from ...files import write_json
from .file import GgufFile
from .names import Weight, plan

if TYPE_CHECKING:
    import torch

_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_READ = {*_KEYS, "attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size"}
_NOTHING = (0, 0.0, False, "none", "")
"""What a key of a feature says where the model does not have it."""
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The same in every Llama 3.1 to 3.3; the file holds only what follows from it."""
_ROPE_FACTORS = "rope_freqs.weight"
_SHARD_BYTES = 10**9


def read_config(file: GgufFile) -> dict[str, Any]:
    """``config.json`` of the model in the file, without the ids of its tokenizer.

    Raises:
        EdgekdError: a key is missing, or holds what no model could have.
        Unsupported: an architecture or a feature that the import does not know.
    """
    name = _architecture(file)
    prefix = f"{name}."
    found = {hf: file.get(prefix + key, int | float) for key, hf in _KEYS.items()}
    known = {hf: value for hf, value in found.items() if value is not None}
    if "token_embd.weight" not in file.tensors:
        raise EdgekdError(f"{file.path}: tensor 'token_embd.weight' is missing.", "Get the file again.")
    tied = "output.weight" not in file.tensors
    config = {
        "architectures": [FAMILIES[name].class_name],
        "model_type": name,
        "vocab_size": file.shape("token_embd.weight")[0],
        **known,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": file.get(f"{prefix}rope.freq_base", float, 10000.0)},
        "tie_word_embeddings": tied,
        "attention_bias": name == "llama" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "dtype": "float32" if file.dequantized else file.dtype("token_embd.weight"),
    }
    arch = read_architecture(config, str(file.path))
    for key in ("rope.dimension_count", "attention.value_length"):
        if (width := file.get(prefix + key, int, arch.head_dim)) != arch.head_dim:
            raise Unsupported(f"{file.path}: key {prefix + key!r} is {width}, not the head's {arch.head_dim}.")
    if _ROPE_FACTORS in file.tensors:
        config["rope_parameters"] |= _llama3(file)
    return config


def _architecture(file: GgufFile) -> str:
    """Its name, which is a ``model_type`` too.

    Raises:
        Unsupported: it is none that the import knows, has features that it does not know, or is part of a model.
    """
    name: str = file.need("general.architecture", str)
    if name not in _ARCHITECTURES:
        raise Unsupported(
            f"{file.path}: architecture {name!r:.60} cannot be imported.", f"Take one of {', '.join(_ARCHITECTURES)}."
        )
    if (kind := file.get("general.type", str, "model")) != "model":
        raise Unsupported(f"{file.path}: it holds an {kind:.60}, not a model.", "Merge it into its model first.")
    if file.get("split.count", int, 1) > 1:
        raise Unsupported(f"{file.path}: it is one of several parts.", "Join them with llama-gguf-split --merge.")
    for key in file.names(f"{name}."):
        if key.removeprefix(f"{name}.") not in _READ and (value := file.get(key, object)) not in _NOTHING:
            raise Unsupported(f"{file.path}: key {key!r} is {value!r:.60}, a feature that cannot be imported.")
    return name


def _llama3(file: GgufFile) -> dict[str, Any]:
    """The parameters of Llama 3.1's scaled rotary embedding, of which the file holds only the factors; that they give
    these factors is seen by ``convert``."""
    return {"rope_type": "llama3", "factor": float(file.tensor(_ROPE_FACTORS).max()), **_LLAMA3}


def _check_rope(file: GgufFile, arch: Architecture) -> None:
    import torch

    if _ROPE_FACTORS not in file.tensors:
        return
    found, expected = file.tensor(_ROPE_FACTORS), torch.tensor(arch.rotaries[0].factors)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5):
        raise Unsupported(f"{file.path}: tensor {_ROPE_FACTORS!r} does not hold Llama 3.1's factors.")


def weights_of(file: GgufFile, arch: Architecture) -> list[Weight]:
    """The place of every weight.

    Raises:
        EdgekdError: a tensor is missing, or has another shape than the keys say.
        Unsupported: a tensor that has no place in the architecture.
    """
    found = plan(arch, arch.model_type)
    _check_rope(file, arch)
    for weight in found:
        if weight.name not in file.tensors:
            raise EdgekdError(f"{file.path}: tensor {weight.name!r} is missing.", "Get the file again.")
        if (shape := file.shape(weight.name)) != weight.shape:
            raise EdgekdError(
                f"{file.path}: tensor {weight.name!r} has shape {shape}, by the keys {weight.shape}.", "Get it again."
            )
    if extra := sorted(file.tensors.keys() - {weight.name for weight in found} - {_ROPE_FACTORS}):
        raise Unsupported(f"{file.path}: tensor {extra[0]!r} has no place in the architecture that the keys describe.")
    return found


def write_weights(file: GgufFile, weights: list[Weight], folder: Path) -> None:
    """Write ``model.safetensors``, or shards with an index, each tensor in a dtype in which it loses nothing."""
    from safetensors.torch import save_file

    shards = list(_shards(file, weights))
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        at = {weight.source: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        size = sum(_size_bytes(file, weight) for weight in weights)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": at})
    for name, shard in zip(names, shards, strict=True):
        tensors = {weight.source: pairs_to_halves(file.tensor(weight.name), weight.heads) for weight in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors writes for the owner's eyes alone


def _shards(file: GgufFile, weights: list[Weight]) -> Iterator[list[Weight]]:
    """The weights in order, in parts of a gigabyte."""
    part, size = list[Weight](), 0
    for weight in weights:
        if part and size + _size_bytes(file, weight) > _SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append(weight)
        size += _size_bytes(file, weight)
    yield part


def _size_bytes(file: GgufFile, weight: Weight) -> int:
    return int(file.tensors[weight.name].n_elements) * (4 if file.dtype(weight.name) == "float32" else 2)


def pairs_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo ``pack.reorder_heads``: rows of a query or key projection as transformers rotates them."""
    if not heads:
        return rows
    split = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape).contiguous()

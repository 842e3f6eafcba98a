"""Models on disk: find, check, load, initialise and save.

A *model folder* is what Hugging Face writes: ``config.json``, ``tokenizer.json``, one or more ``*.safetensors``.
Shapes follow ``torch.nn.Linear``: weights are ``(out, in)``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EdgekdError, SpecError
from .tokenizer_file import try_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from .spec import ConfigStudent, CutStudent, StudentSpec


def resolve_model(reference: str, base: Path = Path()) -> Path:
    """The folder of a model named in a spec.

    Args:
        reference: a folder relative to ``base``, ``builtin:NAME``, or ``hub:ORGANISATION/NAME``, which downloads.

    Raises:
        SpecError: there is no such model.
    """
    if reference.startswith("builtin:"):
        folder = Path(str(resources.files("edgekd") / "teachers" / reference.removeprefix("builtin:")))
        if not folder.is_dir():
            shipped = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
            raise SpecError(f"{reference}: no such built-in model.", f"There are: {', '.join(shipped)}.")
        return folder
    if reference.startswith("hub:"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(reference.removeprefix("hub:"), allow_patterns=["*.json", "*.safetensors"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise SpecError(
                f"{reference}: cannot be downloaded: {reason}", "Check the name and the network."
            ) from error
    folder = base / reference
    if not (folder / "config.json").is_file():
        raise SpecError(f"{folder}: not a model folder: it has no config.json.", "Name a folder, builtin: or hub:.")
    return folder


@dataclass(frozen=True)
class Checkpoint:
    """A model folder read lazily: one tensor in memory at a time."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        path = self.folder / "config.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise EdgekdError(f"{path}: not readable as JSON.", "Save the model again.") from error

    @cached_property
    def files(self) -> dict[str, Path]:
        """The safetensors file of every tensor, checked to be whole.

        Raises:
            EdgekdError: no safetensors, or a truncated file.
        """
        from safetensors import SafetensorError, safe_open

        found: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "numpy") as file:
                    found |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise EdgekdError(f"{path}: truncated or not safetensors ({error}).", "Copy it again.") from error
        if not found:
            raise EdgekdError(f"{self.folder}: no *.safetensors file.", "Other weight formats are not read.")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        from safetensors import safe_open

        with safe_open(self.files[name], "numpy") as file:
            return tuple(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the dtype of the file."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Put a tensor and its file before an error that lacks its subject."""
        try:
            yield
        except EdgekdError as error:
            raise EdgekdError(f"{self.files[name]}: tensor {name!r} {error.cause}", error.remedy) from error

    @property
    def parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        import math

        return sum(math.prod(self.shape(name)) for name in self if not (self.tied and name == "lm_head.weight"))

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", False)) or "lm_head.weight" not in self.files

    @cached_property
    def digest(self) -> str:
        """sha256 over configuration, tokenizer and weights."""
        whole = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".jinja", ".model"):
                whole.update(path.name.encode())
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()


def _quiet() -> None:
    """Turn transformers' own progress bars off: the command line shows the progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder.

    Raises:
        EdgekdError: none is there, or it has more ids than the model's embedding has rows.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # transformers 5 rebuilds some classes' tokenizers (LlamaTokenizer) into ones that give other ids than the
    # tokenizer.json that artifacts carry and runtimes read; the base class takes the file as it stands.
    path = folder / "tokenizer.json"
    if path.is_file():
        try_tokenizer(path)
    as_it_stands = path.is_file() and not trust_remote_code
    loader: Any = PreTrainedTokenizerFast if as_it_stands else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, use_fast=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise EdgekdError(f"{folder}: no usable tokenizer ({error}).", "Put its tokenizer.json there.") from error
    rows = Checkpoint(folder).config.get("vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise EdgekdError(
            f"{folder}: the tokenizer has {len(tokenizer)} ids, the embedding {rows} rows (config.json: vocab_size).",
            "Use the model's own tokenizer, or resize the embedding.",
        )
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in evaluation mode; float32 unless ``dtype`` says otherwise.

    Raises:
        EdgekdError: a file is missing or truncated, or the tensors do not fit the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _quiet()
    checkpoint = Checkpoint(folder)
    _ = checkpoint.files  # names a truncated file
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or torch.float32, local_files_only=True, trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EdgekdError(f"{folder}: cannot be loaded: {reason}", "Check config.json against the weights.") from error
    return model.eval()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model folder. ``folder`` should be a temporary one that is renamed when whole."""
    _quiet()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner's eyes alone


def student_config(spec: StudentSpec, teacher: Mapping[str, Any], base: Path = Path()) -> dict[str, Any]:
    """``config.json`` of the student that ``spec`` describes, without building it.

    Args:
        teacher: the teacher's ``config.json``.
        base: folder that relative paths start from.

    Raises:
        SpecError: more layers or units than the teacher has, or heads that do not divide.
    """
    if spec.init == "checkpoint":
        return Checkpoint(resolve_model(spec.model, base)).config
    if spec.init == "cut":
        return _cut_config(spec, teacher)
    return _fresh_config(spec, teacher)


def init_student(spec: StudentSpec, teacher_folder: Path, seed: int, base: Path = Path()) -> PreTrainedModel:
    """The student before training, in float32.

    A cut student holds exact copies of the teacher's weights: evenly spaced layers (DistilBERT, Sanh et al. 2019;
    Minitron, Muralidharan et al. 2024) and, where narrower, the MLP units with the largest product of weight norms.
    The teacher is read tensor by tensor.

    Args:
        seed: seeds the weights of a fresh student; PyTorch's global generator is left as it was.

    Raises:
        SpecError: more layers or units than the teacher has, or a vocabulary other than the teacher's.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    teacher = Checkpoint(teacher_folder)
    config = student_config(spec, teacher.config, base)
    if spec.init == "checkpoint":
        folder = resolve_model(spec.model, base)
        ids = len(load_tokenizer(teacher_folder))
        if config.get("vocab_size", ids) < ids:
            raise SpecError(
                f"student.model: {folder} has {config['vocab_size']} embedding rows for {ids} ids of the teacher.",
                "Take a student with the teacher's tokenizer.",
            )
        return load_model(folder)
    if spec.init == "cut":
        _ = teacher.files  # names a truncated file before a model is built
    model_type = config.get("model_type", "")
    try:
        hf_config = CONFIG_MAPPING[model_type].from_dict(config)
    except (KeyError, ValueError, TypeError) as error:
        raise EdgekdError(
            f"{teacher_folder}: no student can be built from model_type {model_type!r}.", "Use Llama, Qwen2 or Qwen3."
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    if spec.init == "cut":
        _copy_cut(model, teacher, kept_layers(teacher.config["num_hidden_layers"], spec.layers))
    return model.eval()


def kept_layers(teacher_layers: int, layers: int) -> list[int]:
    """Indices of ``layers`` evenly spaced teacher layers, the first and the last among them, ascending."""
    if layers == 1:
        return [0]
    gaps = layers - 1
    return [(2 * i * (teacher_layers - 1) + gaps) // (2 * gaps) for i in range(layers)]


def _cut_config(spec: CutStudent, teacher: Mapping[str, Any]) -> dict[str, Any]:
    layers, width = teacher.get("num_hidden_layers"), teacher.get("intermediate_size")
    if layers is None:
        raise SpecError("student.init: cut: the teacher's config.json has no num_hidden_layers.", "Use init: config.")
    if spec.layers > layers:
        raise SpecError(
            f"student.layers: {spec.layers} layers cannot be cut from a teacher of {layers}.",
            f"Set student.layers to {layers} or fewer.",
        )
    if spec.layers == 1 < layers:
        raise SpecError(
            f"student.layers: 1 cannot keep the first and the last of the teacher's {layers} layers.",
            "Set student.layers to 2 or more.",
        )
    config = {**teacher, "num_hidden_layers": spec.layers, "dtype": "float32"}
    config.pop("torch_dtype", None)
    types = teacher.get("layer_types")
    if types is None and teacher.get("use_sliding_window"):
        first_sliding = teacher.get("max_window_layers", layers)
        types = ["sliding_attention" if i >= first_sliding else "full_attention" for i in range(layers)]
    if types is not None:
        if len(types) != layers:
            raise SpecError(
                f"teacher.model: config.json names {layers} layers and {len(types)} layer_types.", "Save it again."
            )
        config["layer_types"] = [types[i] for i in kept_layers(layers, spec.layers)]
    if spec.hidden_size is not None:
        hidden = teacher["hidden_size"]
        if spec.hidden_size > hidden:
            raise SpecError(
                f"student.hidden_size: {spec.hidden_size} channels cannot be cut from a teacher of {hidden}.",
                f"Set student.hidden_size to {hidden} or fewer.",
            )
        # The heads stay as they are, so their width no longer follows from the channels.
        config["head_dim"] = teacher.get("head_dim") or hidden // teacher["num_attention_heads"]
        config["hidden_size"] = spec.hidden_size
    if spec.intermediate_size is not None:
        if not isinstance(width, int):
            raise SpecError("student.intermediate_size: the teacher's config.json has no such width.", "Leave it out.")
        if spec.intermediate_size > width:
            raise SpecError(
                f"student.intermediate_size: {spec.intermediate_size} units cannot be cut from a teacher of {width}.",
                f"Set student.intermediate_size to {width} or fewer.",
            )
        config["intermediate_size"] = spec.intermediate_size
    return config


def _fresh_config(spec: ConfigStudent, teacher: Mapping[str, Any]) -> dict[str, Any]:
    if spec.head_dim is None and spec.hidden_size % spec.heads:
        raise SpecError(
            f"student.heads: {spec.heads} heads do not divide student.hidden_size {spec.hidden_size}.",
            "Change one of them, or set student.head_dim.",
        )
    if spec.heads % spec.kv_heads:
        raise SpecError(
            f"student.kv_heads: {spec.kv_heads} do not divide the {spec.heads} of student.heads.", "Change one of them."
        )
    head_dim = spec.head_dim or spec.hidden_size // spec.heads
    if head_dim % 2:
        raise SpecError(
            f"student.head_dim: {head_dim} is odd, and rotary embeddings turn pairs.", "Choose an even head_dim."
        )
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    rope = teacher.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or teacher.get("rope_theta") or 10000.0
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    return {
        # The special ids are named even where absent: these classes have defaults of their own.
        **{key: teacher.get(key) for key in kept if key in teacher or key.endswith("_token_id")},
        "model_type": spec.architecture,
        "architectures": [classes[spec.architecture]],
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": spec.tie_embeddings,
        "dtype": "float32",
    }


def _copy_cut(model: PreTrainedModel, teacher: Checkpoint, layers: list[int]) -> None:
    """Fill every parameter of ``model`` with the teacher's of the layer it stands for."""
    import torch

    units: dict[int, torch.Tensor] = {}
    before, after = teacher.config["hidden_size"], model.config.hidden_size
    channels = _largest_channels(teacher, layers, after) if after < before else None
    for name, parameter in model.named_parameters():
        found = re.match(r"(.*\blayers\.)(\d+)(\..*)", name)
        layer = layers[int(found[2])] if found else None
        source = f"{found[1]}{layer}{found[3]}" if found else name
        if source not in teacher.files:
            raise EdgekdError(f"{teacher.folder}: has no tensor {source}.", "Check config.json against the weights.")
        weight = teacher.tensor(source)
        if weight.shape != parameter.shape and found and layer is not None and ".mlp." in name:
            keep = parameter.shape[1 if "down_proj" in name else 0]
            if layer not in units:
                units[layer] = _largest_units(teacher, f"{found[1]}{layer}.mlp.", keep)
            weight = weight.index_select(1 if "down_proj" in name else 0, units[layer])
        if channels is not None and (side := _channel_side(name)) is not None:
            weight = weight.index_select(side, channels)
            if weight.ndim == 1 and "norm" in name:
                weight = weight * (before / after) ** 0.5  # RMSNorm's mean is now over the kept channels alone
        if weight.shape != parameter.shape:
            raise EdgekdError(
                f"{teacher.folder}: tensor {source} is {tuple(weight.shape)}, expected {tuple(parameter.shape)}.",
                "Check config.json against the weights.",
            )
        with torch.no_grad():
            parameter.copy_(weight)


def _channel_side(name: str) -> int | None:
    """The side of a parameter that the residual stream's channels index, or None."""
    if name.endswith(("o_proj.weight", "down_proj.weight", "layernorm.weight", "model.norm.weight")):
        return 0
    reads = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    return 1 if name.endswith((*reads, "embed_tokens.weight", "lm_head.weight")) else None


def _largest_channels(teacher: Checkpoint, layers: list[int], keep: int) -> torch.Tensor:
    """Ascending int64 ``(keep,)`` indices of the channels with the largest norm over all that writes to them: the
    embedding, and the output projections of the kept layers."""
    import torch

    energy = teacher.tensor("model.embed_tokens.weight").float().square().mean(0)
    for layer in layers:
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            energy += teacher.tensor(f"model.layers.{layer}.{part}.weight").float().square().mean(1)
    return torch.topk(energy, keep).indices.sort().values


def _largest_units(teacher: Checkpoint, prefix: str, keep: int) -> torch.Tensor:
    """Ascending int64 ``(keep,)`` indices of the MLP units with the largest product of weight norms.

    A unit's output is gate · up · down, so that the product bounds what it can add to the residual stream.
    """
    import torch

    names = {part: f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")}
    if not all(name in teacher.files for name in names.values()):
        raise SpecError(
            f"student.intermediate_size: {teacher.folder} has no gate, up and down projection under {prefix}",
            "Leave student.intermediate_size out.",
        )
    norms = [teacher.tensor(name).float().norm(dim=0 if part == "down" else 1) for part, name in names.items()]
    return torch.stack(norms).prod(0).topk(keep).indices.sort().values

"""Models on disk: find, load, initialise and save.

A *model folder* is what Hugging Face writes: ``config.json``, ``tokenizer.json``, one or more ``*.safetensors``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from .architecture import FAMILIES, head_size, read_decoder
from .checkpoint import EMBEDDING, Checkpoint
from .errors import EdgekdError, SpecError
from .files import read_json
from .privacy import online
from .tokenizer_file import try_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from .spec import ConfigStudent, CutStudent, StudentSpec


_GENERATION = "generation_config.json"
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")


def resolve_model(reference: str, base: Path = Path(), files: Sequence[str] = _HUB_FILES) -> Path:
    """The folder of a model named in a spec.

    Args:
        reference: a folder relative to ``base``, ``builtin:NAME``, or ``hub:ORGANISATION/NAME``, which downloads, with
            ``@REVISION`` (a branch, tag or commit) where it is not to be the newest.
        files: what is downloaded.

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
        return _downloaded(reference, files)
    folder = base / reference
    if not (folder / "config.json").is_file():
        raise SpecError(f"{folder}: not a model folder: it has no config.json.", "Name a folder, builtin: or hub:.")
    return folder


def _downloaded(reference: str, files: Sequence[str]) -> Path:
    """The folder of a hub model; what of it was downloaded before is not again."""
    from huggingface_hub import errors, snapshot_download

    name, _, revision = reference.removeprefix("hub:").partition("@")
    try:
        with online():
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
    except errors.GatedRepoError as error:
        raise SpecError(
            f"{reference}: its owners ask you to accept their terms first.",
            f"Do so on its page on the Hub, then log in: hf auth login, or set HF_TOKEN ({_first_line(error)}).",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SpecError(f"{reference}: it has no revision {revision}.", "Name a branch, a tag or a commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise SpecError(
            f"{reference}: the Hub has no such model, or does not show it to you.",
            "Check the name; for a private one log in: hf auth login, or set HF_TOKEN.",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        cause = f"{reference}: cannot be downloaded: {_first_line(error)}"
        raise SpecError(cause, "Check the name and the network; the same command goes on.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars and reports: the command line shows the progress, and our errors say
    what is wrong."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder.

    Raises:
        EdgekdError: none is there, it cannot be read, or it has more ids than the model's embedding has rows.
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
        tokenizer("a")  # some settings of a wrong type are first met at work
    except Exception as error:  # tokenizers raises Exception itself, transformers what a wrong type brings about
        raise EdgekdError(
            f"{folder}: no usable tokenizer ({_reason(error)}).", "Put its tokenizer.json there, or update edgekd."
        ) from error
    rows, ids = Checkpoint(folder).decoder.vocab_size, vocabulary_size(tokenizer)
    if rows is not None and ids > rows:
        raise EdgekdError(
            f"{folder}: the tokenizer has {ids} ids, the embedding {rows} rows (config.json: vocab_size).",
            "Use the model's own tokenizer, or resize the embedding.",
        )
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id. The ids may have holes, so this is no count of tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def load_model(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in evaluation mode; float32 unless ``dtype`` says otherwise.

    Raises:
        EdgekdError: the folder cannot be read, or its tensors are not exactly those of the architecture.
    """
    import torch
    from safetensors import safe_open

    checkpoint = Checkpoint(folder)
    with ExitStack() as opened:
        files = {stored.file: None for stored in checkpoint.tensors.values()}
        readers = {path: opened.enter_context(safe_open(path, "pt")) for path in files}
        slices = {name: readers[at.file].get_slice(at.name) for name, at in checkpoint.tensors.items()}
        return _fill(checkpoint, slices, dtype or torch.float32, None, trust_remote_code).eval()


def check_model(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse what ``load_model`` would, without reading a weight.

    Raises:
        EdgekdError: the folder cannot be read, or its tensors are not exactly those of the architecture.
    """
    import torch

    checkpoint = Checkpoint(folder)
    hollow = {name: torch.empty(checkpoint.shape(name), device="meta") for name in checkpoint}
    _fill(checkpoint, hollow, torch.float32, "meta", trust_remote_code)


def _fill(
    checkpoint: Checkpoint,
    tensors: Mapping[str, object],
    dtype: torch.dtype,
    device: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model with these tensors, which transformers may take under other names of its own.

    Args:
        tensors: by name, each a tensor or safetensors' lazy slice of one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_plain(checkpoint)
    trusted: dict[str, object] = {"trust_remote_code": trust_remote_code}
    told: dict[str, object] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, **trusted)
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config, **trusted))
            model, said = kind.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, device_map=device, **told
            )
    except Exception as error:  # a stranger's configuration: its classes raise whatever it brings about
        raise EdgekdError(
            f"{checkpoint.folder}: cannot be loaded: {_reason(error)}.", "Check config.json against the weights."
        ) from error
    _check_whole(checkpoint, said)
    return model


def _check_plain(checkpoint: Checkpoint) -> None:
    """Refuse a quantized model, and sizes that no tensor has, which may be long in the making."""
    where = checkpoint.folder / "config.json"
    if checkpoint.decoder.quantization_config is not None:
        method = checkpoint.decoder.quantization_config.get("quant_method")
        raise EdgekdError(f"{where}: the model is quantized already ({method}).", "Give the model it was made from.")
    widest = max((side for name in checkpoint for side in checkpoint.shape(name)), default=0)
    most = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), widest)
    for key, bound in {**most, "num_hidden_layers": len(checkpoint)}.items():
        value = getattr(checkpoint.decoder, key)
        if isinstance(value, int) and value > bound:
            raise EdgekdError(
                f"{where}: {key}: {value} is more than the weights have.", "Check config.json against the weights."
            )


class _LoadingInfo(TypedDict):
    """What transformers says of the tensors it was given."""

    mismatched_keys: Collection[tuple[str, Sequence[int], Sequence[int]]]
    missing_keys: Collection[str]
    unexpected_keys: Collection[str]
    error_msgs: Sequence[str]


def _check_whole(checkpoint: Checkpoint, said: _LoadingInfo) -> None:
    """No weight may be left as it was made, none may be left over."""
    remedy = "Save the model again, or check config.json against the weights."
    for name, found, expected in sorted(said["mismatched_keys"]):
        raise EdgekdError(
            f"{checkpoint.folder}: tensor {name!r} has shape {tuple(found)}, by config.json {tuple(expected)}.", remedy
        )
    missing, extra = sorted(said["missing_keys"]), sorted(said["unexpected_keys"])
    if missing:
        same = next((name for name in extra if name.endswith(missing[0])), None)
        instead = f"; there is {same!r}" if same else ""
        raise EdgekdError(f"{checkpoint.folder}: tensor {missing[0]!r} is missing{instead}.", remedy)
    if extra:
        raise EdgekdError(
            f"{checkpoint.folder}: tensor {extra[0]!r} has no place in the model that config.json describes "
            f"({len(extra)} such).",
            remedy,
        )
    if said["error_msgs"]:
        raise EdgekdError(f"{checkpoint.folder}: cannot be loaded: {said['error_msgs'][0]:.300}", remedy)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, generation: Path | None = None
) -> None:
    """Write a model folder. ``folder`` should be a temporary one that is renamed when whole.

    Args:
        generation: the ``generation_config.json`` that it inherits; without one the model's own is written.
    """
    with _quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation:
        shutil.copyfile(generation, folder / _GENERATION)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner's eyes alone


def generation_config(spec: StudentSpec, teacher_folder: Path, base: Path = Path()) -> Path | None:
    """The ``generation_config.json`` that a student inherits: its tokenizer is the teacher's, and so are the ids that
    end a text; what a student that exists says counts where the teacher says nothing.

    Raises:
        EdgekdError: it cannot be read.
    """
    folders = [teacher_folder, *([resolve_model(spec.model, base)] if spec.init == "checkpoint" else [])]
    found = next((folder / _GENERATION for folder in folders if (folder / _GENERATION).is_file()), None)
    if found:
        read_json(found, remedy="Save the model again.")
    return found


@dataclass(frozen=True)
class Kept:
    """What a cut student keeps of its teacher, all ascending."""

    layers: Sequence[int]
    channels: torch.Tensor | None = None
    """int64: of the residual stream; None: every one, or those of largest weights where the student is narrower."""
    units: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """int64, by the teacher's layer: of its MLP; where it names none, every one, or those of largest weights."""


def student_config(
    spec: StudentSpec, teacher: Mapping[str, object], base: Path = Path(), layers: Sequence[int] | None = None
) -> dict[str, object]:
    """``config.json`` of the student that ``spec`` describes, without building it.

    Args:
        teacher: the teacher's ``config.json``.
        base: folder that relative paths start from.
        layers: of the teacher that a cut student keeps; default: evenly spaced ones.

    Raises:
        SpecError: more layers or units than the teacher has, heads that do not divide, or no such architecture.
    """
    if spec.init == "checkpoint":
        return Checkpoint(resolve_model(spec.model, base)).config
    config = _cut_config(spec, teacher, layers) if spec.init == "cut" else _fresh_config(spec, teacher)
    _transformers_config(config)
    return config


def _transformers_config(config: Mapping[str, object]) -> PreTrainedConfig:
    """A ``config.json`` as transformers has it, once its own checks have passed."""
    from transformers import CONFIG_MAPPING

    model_type = read_decoder(config).model_type
    if model_type not in CONFIG_MAPPING:
        raise SpecError(f"no student can be built from model_type {model_type!r}.", "Use Llama, Qwen2 or Qwen3.")
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(config))
    except Exception as error:  # each class checks what it likes, and raises what it likes
        raise SpecError(
            f"student: no {model_type} can be built so: {_reason(error)}.", "Change student's sizes, or the teacher."
        ) from error


def _reason(error: Exception) -> str:
    """The line of a library's error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].startswith("Unrecognized configuration class"):  # and then a page of class names
        return "it is no model that continues text (model_type)"
    return f"{lines[1 if lines[0].endswith(':') and lines[1:] else 0].rstrip('.'):.300}"


def init_student(
    spec: StudentSpec,
    teacher_folder: Path,
    seed: int,
    base: Path = Path(),
    *,
    kept: Kept | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The student before training, in float32.

    A cut student holds exact copies of the teacher's weights. The teacher is read tensor by tensor.

    Args:
        seed: seeds the weights of a fresh student; PyTorch's global generator is left as it was.
        kept: of the teacher, for a cut. Default: evenly spaced layers (DistilBERT, Sanh et al. 2019) and, where the
            student is narrower, what has the largest weights.
        trust_remote_code: of the teacher's tokenizer.

    Raises:
        SpecError: more layers or units than the teacher has, or a vocabulary other than the teacher's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if spec.init == "checkpoint":
        folder = resolve_model(spec.model, base)
        tokenizer = load_tokenizer(teacher_folder, trust_remote_code=trust_remote_code)
        rows, ids = Checkpoint(folder).decoder.vocab_size, vocabulary_size(tokenizer)
        if rows is not None and rows < ids:
            raise SpecError(
                f"student.model: {folder} has {rows} embedding rows for {ids} ids of the teacher.",
                "Take a student with the teacher's tokenizer.",
            )
        return load_model(folder)
    teacher = Checkpoint(teacher_folder)
    _ = teacher.tensors  # names a damaged file before a model is built
    if spec.init == "cut" and kept is None:
        kept = Kept(evenly_spaced_layers(teacher.decoder.size("num_hidden_layers"), spec.depth))
    config = _transformers_config(student_config(spec, teacher.config, base, kept.layers if kept else None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kept is not None:
        _copy_cut(model, teacher, kept)
    return model.eval()


def evenly_spaced_layers(teacher_layers: int, layers: int) -> list[int]:
    """Indices of ``layers`` evenly spaced teacher layers, the first and the last among them, ascending."""
    if layers == 1:
        return [0]
    gaps = layers - 1
    return [(2 * i * (teacher_layers - 1) + gaps) // (2 * gaps) for i in range(layers)]


def _cut_config(spec: CutStudent, teacher: Mapping[str, object], kept: Sequence[int] | None) -> dict[str, object]:
    if "num_hidden_layers" not in teacher:
        raise SpecError("student.init: cut: the teacher's config.json has no num_hidden_layers.", "Use init: config.")
    layers = read_decoder(teacher).size("num_hidden_layers")
    if spec.depth > layers:
        raise SpecError(
            f"student.layers: {spec.depth} layers cannot be cut from a teacher of {layers}.",
            f"Set student.layers to {layers} or fewer.",
        )
    if spec.choose == "even" and spec.depth == 1 < layers:
        raise SpecError(
            f"student.layers: 1 cannot keep the first and the last of the teacher's {layers} layers.",
            "Set student.layers to 2 or more, or student.choose to greedy.",
        )
    kept = kept or evenly_spaced_layers(layers, spec.depth)
    config = {**teacher, "num_hidden_layers": spec.depth, "dtype": "float32"}
    config.pop("torch_dtype", None)
    return config | _cut_by_layer(kept, teacher, layers) | _cut_widths(spec, teacher)


def _cut_by_layer(kept: Sequence[int], teacher: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """What a configuration says of each layer, of those that are kept. Where it says nothing, its class goes by the
    layer's number, which the cut changes."""
    decoder = read_decoder(teacher)
    found: dict[str, Any] = {}
    for key, usual in (("layer_types", "full_attention"), ("no_rope_layers", 1)):
        said = getattr(decoder, key)
        values = said or getattr(_transformers_config(teacher), key, None)
        if values is None or (said is None and set(values) == {usual}):
            continue
        if len(values) < layers:
            raise SpecError(
                f"teacher.model: config.json names {layers} layers and {len(values)} {key}.", "Save it again."
            )
        found[key] = [values[i] for i in kept]
    return found


def _cut_widths(spec: CutStudent, teacher: Mapping[str, object]) -> dict[str, object]:
    decoder = read_decoder(teacher)
    widths: dict[str, object] = {}
    if spec.hidden_size is not None:
        hidden = decoder.size("hidden_size")
        if spec.hidden_size > hidden:
            raise SpecError(
                f"student.hidden_size: {spec.hidden_size} channels cannot be cut from a teacher of {hidden}.",
                f"Set student.hidden_size to {hidden} or fewer.",
            )
        # The heads stay as they are, so their width no longer follows from the channels.
        widths |= {"head_dim": decoder.head_size, "hidden_size": spec.hidden_size}
    if spec.intermediate_size is not None:
        width = decoder.intermediate_size
        if not isinstance(width, int):
            raise SpecError("student.intermediate_size: the teacher's config.json has no such width.", "Leave it out.")
        if spec.intermediate_size > width:
            raise SpecError(
                f"student.intermediate_size: {spec.intermediate_size} units cannot be cut from a teacher of {width}.",
                f"Set student.intermediate_size to {width} or fewer.",
            )
        widths["intermediate_size"] = spec.intermediate_size
    return widths


def _fresh_config(spec: ConfigStudent, teacher: Mapping[str, object]) -> dict[str, object]:
    _check_heads(spec)
    decoder = read_decoder(teacher)
    rope = decoder.rope_parameters
    context = (
        {} if decoder.max_position_embeddings is None else {"max_position_embeddings": decoder.max_position_embeddings}
    )
    return {
        # The special ids are named even where absent: these classes have defaults of their own.
        "vocab_size": decoder.size("vocab_size"),
        "bos_token_id": decoder.bos_token_id,
        "eos_token_id": decoder.eos_token_id,
        "pad_token_id": decoder.pad_token_id,
        **context,
        "model_type": spec.architecture,
        "architectures": [FAMILIES[spec.architecture].class_name],
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": head_size(spec.head_dim, spec.hidden_size, spec.heads),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": (rope.rope_theta if rope else None) or decoder.rope_theta or 10000.0,
        },
        "tie_word_embeddings": spec.tie_embeddings,
        "dtype": "float32",
    }


def _check_heads(spec: ConfigStudent) -> None:
    if spec.head_dim is None and spec.hidden_size % spec.heads:
        raise SpecError(
            f"student.heads: {spec.heads} heads do not divide student.hidden_size {spec.hidden_size}.",
            "Change one of them, or set student.head_dim.",
        )
    if spec.heads % spec.kv_heads:
        raise SpecError(
            f"student.kv_heads: {spec.kv_heads} do not divide the {spec.heads} of student.heads.", "Change one of them."
        )
    head_dim = head_size(spec.head_dim, spec.hidden_size, spec.heads)
    if head_dim % 2:
        raise SpecError(
            f"student.head_dim: {head_dim} is odd, and rotary embeddings turn pairs.", "Choose an even head_dim."
        )


def _copy_cut(model: PreTrainedModel, teacher: Checkpoint, kept: Kept) -> None:
    """Fill every parameter of ``model`` with the teacher's of the layer it stands for."""
    import torch

    layers, units, channels = kept.layers, dict(kept.units), kept.channels
    before, after = teacher.decoder.size("hidden_size"), model.config.hidden_size
    if channels is None and after < before:
        channels = _largest_channels(teacher, layers, after)
    for name, parameter in model.named_parameters():
        found = re.match(r"(.*\blayers\.)(\d+)(\..*)", name)
        layer = layers[int(found[2])] if found else None
        source = f"{found[1]}{layer}{found[3]}" if found else name
        if source not in teacher.tensors:
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
                offset = int(teacher.architecture.norm_offset)
                # RMSNorm's mean is now over the kept channels alone
                weight = (weight + offset) * (before / after) ** 0.5 - offset
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
    reads = tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "qkv", "gate", "up", "gate_up"))
    return 1 if name.endswith((*reads, "embed_tokens.weight", "lm_head.weight")) else None


def _largest_channels(teacher: Checkpoint, layers: Sequence[int], keep: int) -> torch.Tensor:
    """Ascending int64 ``(keep,)`` indices of the channels with the largest norm over all that writes to them: the
    embedding, and the output projections of the kept layers."""
    energy = teacher.tensor(EMBEDDING).float().square().mean(0)
    for layer in layers:
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            energy += teacher.tensor(f"model.layers.{layer}.{part}.weight").float().square().mean(1)
    return largest(energy, keep)


def _largest_units(teacher: Checkpoint, prefix: str, keep: int) -> torch.Tensor:
    """Ascending int64 ``(keep,)`` indices of the MLP units with the largest product of weight norms.

    A unit's output is gate · up · down, so that the product bounds what it can add to the residual stream.
    """
    import torch

    names = {part: f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")}
    if not all(name in teacher.tensors for name in names.values()):
        raise SpecError(
            f"student.intermediate_size: {teacher.folder} has no gate, up and down projection under {prefix}",
            "Leave student.intermediate_size out.",
        )
    norms = [teacher.tensor(name).float().norm(dim=0 if part == "down" else 1) for part, name in names.items()]
    return largest(torch.stack(norms).prod(0), keep)


def largest(importance: torch.Tensor, keep: int) -> torch.Tensor:
    """Ascending int64 indices of the ``keep`` largest, on the CPU."""
    return importance.topk(keep).indices.sort().values.cpu()

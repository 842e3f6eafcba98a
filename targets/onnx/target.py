"""ONNX for onnxruntime: fp16 and fp32 from the student, the portable grid from the quantized student as it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ...architecture import Architecture
from ...checkpoint import Checkpoint
from ...errors import BadArtifact, NoGpu, SpecError, Unsupported
from ...files import write_json
from ...manifest import Artifact, Contract
from ...session import Arithmetic, Session
from ...spec import Name
from ...student import load_tokenizer
from ..shared.artifact import (
    Details,
    Job,
    TokenizerProof,
    Written,
    build_artifact,
    check_installed,
    check_size,
    cores,
    details_of,
    main_file,
)
from ..shared.decoder import DECODER_FEATURES, asked_for, check_features, check_weights
from ..shared.recipes import Real, real_of
from ..shared.session import DecoderSession
from ..shared.source import plain_form
from ..shared.target import TargetOptions
from ..shared.tokenizer import (
    CHATS,
    TOKENIZER,
    SessionTokenizer,
    chat_template,
    check_has_tokenizer,
    compare_tokenizers,
    contract_of,
)
from . import graph as graph_
from .selftest import self_test
from .session import (
    GENAI,
    PROVIDERS,
    OnnxEngine,
    check_graph,
    choose_provider,
    genai_tokenizer,
    gpu_providers,
    load,
    runtime,
)

if TYPE_CHECKING:
    from onnx import ModelProto
    from transformers import PreTrainedTokenizerFast

    from ...quant.recipe import Recipe

__all__ = [
    "EXTRA",
    "FEATURES",
    "PACKAGES",
    "TITLE",
    "Options",
    "check",
    "describe_gpus",
    "export",
    "gpu",
    "inspect",
    "open",
    "self_test",
]

TITLE, EXTRA = "ONNX", "onnx"
PACKAGES = ("onnxruntime", "onnxruntime-genai", "onnx")
MAIN_FILE = "model.onnx"
FEATURES = DECODER_FEATURES
"""What the graph has a place for."""
TESTED = ("cpu",)
_WITHOUT_KERNELS = ("coreml", "qnn", "nnapi")


class Options(TargetOptions):
    """An ONNX target."""

    providers: Annotated[list[Name], Field(min_length=1, max_length=16)] = Field(
        ["cpu"],
        description="Execution providers, the preferred one first: cpu (tested) cuda dml webgpu (not run).",
    )


class ChatProof(Details):
    """Whether onnxruntime-genai renders chats as the tokenizer does."""

    chats: int = Field(ge=0)
    differ: int = Field(ge=0)
    first: str | None


class OnnxDetails(Details):
    """What the manifest says of an ONNX artifact."""

    providers: dict[str, str] = Field(min_length=1)
    """The preferred first, and whether it was tested."""
    activations: Literal["float16", "float32"]
    ops: dict[str, int]
    """Nodes of the decoder by operator."""
    data_bytes: int = Field(ge=0)
    tokenizer: TokenizerProof
    chat: ChatProof | None


def arithmetic(recipe: Recipe, asked: Mapping[str, object]) -> Arithmetic:
    """MatMulNBits of accuracy level 4 rounds its inputs to 8 bits in blocks as long as the weights' groups."""
    if recipe.native:
        return "float32"
    return "int8 by 32" if recipe.on_grid else "float16"


def check(config: Mapping[str, object], tokenizer_folder: Path, spec: Options) -> None:
    """Refuse what the exporter cannot write, from ``config.json`` and the tokenizer's files alone.

    Raises:
        SpecError: an unknown recipe or execution provider, or a context longer than the student's.
        Unsupported: an architecture or setting that the exporter does not write, or a provider without its kernels.
        EdgekdError: no tokenizer.
        MissingExtra: a package of the extra is not installed.
    """
    arch, context_length = asked_for(config, spec)
    _check_providers(spec.providers)
    check_features(arch, FEATURES, TITLE, context_length)
    _check_heads(arch)
    check_has_tokenizer(tokenizer_folder)
    check_installed("onnx", "onnx", GENAI, "tokenizers")
    runtime()


def _check_heads(arch: Architecture) -> None:
    for channels in (arch.head_dim, *(rotary.dim for rotary in arch.rotaries)):
        if channels % 16:
            raise Unsupported(
                f"config.json: head_dim {arch.head_dim}: onnxruntime's GroupQueryAttention takes heads, and rotary "
                f"embeddings, of a multiple of 16 channels, not {channels}.",
                "Export another target.",
            )


def _check_providers(providers: list[str]) -> None:
    for name in providers:
        if name not in (*PROVIDERS, *_WITHOUT_KERNELS):
            raise SpecError(f"targets: unknown execution provider {name!r}; there are: {', '.join(PROVIDERS)}.")
        if name in _WITHOUT_KERNELS:
            raise Unsupported(
                f"targets: provider {name!r} has no kernel for MatMulNBits and GroupQueryAttention; "
                "onnxruntime-genai's builder makes no graph for it.",
                f"Choose from {', '.join(PROVIDERS)}; for phones, cpu.",
            )


def export(
    student: Path,
    spec: Options,
    recipe: str,
    out_dir: Path,
    *,
    name: str,
    quantized: Path | None = None,
    moments: Path | None = None,  # of native recipes: onnxruntime has none
) -> Artifact:
    """Write ``model.onnx``, its data, ``genai_config.json``, the tokenizer and the manifest; see ``targets.export``.

    Needs memory for a tensor, not for the model.
    """
    check(Checkpoint(student).config, student, spec.model_copy(update={"recipes": [recipe]}))
    return build_artifact(
        student,
        spec,
        recipe,
        out_dir,
        quantized,
        lambda job: _write(job, spec),
        name=name,
        title=TITLE,
        packages=PACKAGES,
        runtime="onnxruntime",
        main_file=MAIN_FILE,
    )


def open(artifact: Artifact, *, threads: int | None = None) -> Session:
    """The artifact in onnxruntime.

    Raises:
        BadArtifact: the data file is missing or truncated, or onnxruntime refuses the file.
        EdgekdError: none of the artifact's execution providers is installed.
        MissingExtra: onnxruntime is not installed.
    """
    details, contract = details_of(artifact, OnnxDetails), artifact.manifest.contract
    path, head = main_file(artifact, MAIN_FILE), artifact.path(graph_.HEAD_FILE)
    check_size(artifact.path(graph_.DATA_FILE), details.data_bytes)
    engine = OnnxEngine(path, head, contract, choose_provider(list(details.providers)), cores(threads))
    encoder = None
    if details.tokenizer.used == GENAI:
        artifact.check_nothing_else()  # genai looks for the tokenizer's files itself
        encoder = partial(genai_tokenizer, artifact.folder)
    return DecoderSession(engine, SessionTokenizer(artifact.path(TOKENIZER), "onnx", encoder), contract)


def inspect(artifact: Artifact) -> None:
    """Read the graphs without onnxruntime, before it does.

    Raises:
        BadArtifact: one names files that are not the artifact's, or holds a shorter context.
        MissingExtra: onnx is not installed.
    """
    context_length = artifact.manifest.contract.context_length
    check_graph(main_file(artifact, MAIN_FILE), artifact, context_length)
    check_graph(artifact.path(graph_.HEAD_FILE), artifact)


def gpu(asked: Mapping[str, object]) -> str | None:
    """The execution provider that computes an artifact here, where it is not the CPU's."""
    wanted = asked.get("providers")
    here = ["cpu", *gpu_providers()]
    chosen = next((name for name in wanted if name in here), "cpu") if isinstance(wanted, Mapping) else "cpu"
    return None if chosen == "cpu" else PROVIDERS[chosen]


def describe_gpus() -> str:
    """The execution providers of GPUs that this onnxruntime has.

    Raises:
        NoGpu: it has none; how to get one.
    """
    if found := gpu_providers():
        return f"onnxruntime has {', '.join(PROVIDERS[name] for name in found)}; edgekd has not been run on them"
    raise NoGpu(
        "this onnxruntime computes on the CPU alone.",
        "NVIDIA: pip uninstall onnxruntime, pip install onnxruntime-gpu. Windows: onnxruntime-directml.",
    )


def cache_value_bytes(spec: Options) -> int:
    """Of a number in the cache: float32 on the CPU, float16 elsewhere."""
    return 2 if _activations(spec) == "float16" else 4


def _activations(spec: Options) -> Real:
    return "float16" if set(spec.providers) - {"cpu"} else "float32"


def _write(job: Job, spec: Options) -> Written:
    """Write everything but the manifest."""
    from .pack import write_data

    checkpoint, folder = job.checkpoint, job.folder
    check_weights(checkpoint.architecture, job.source, TITLE)
    source, arch = plain_form(job.source, checkpoint.architecture)
    context, activations = spec.context_of(arch.context_length), _activations(spec)
    apart = "dml" in spec.providers
    settings = graph_.Settings(source.kinds, source.tied, activations, context, real_of(job.recipe), rotary_apart=apart)
    tokenizer = load_tokenizer(checkpoint.folder)
    contract = contract_of(tokenizer, checkpoint.folder, arch.vocab_size, context)
    tokenizer.save_pretrained(folder)
    config = genai_config(arch, contract, tokenizer.pad_token_id, spec.providers, positions=settings.rotary_apart)
    write_json(folder / "genai_config.json", config)
    write_json(folder / "config.json", transformers_js_config(checkpoint.config, activations))
    models = graph_.build(arch, settings)
    (folder / MAIN_FILE).write_bytes(models.decoder.SerializeToString())
    (folder / graph_.HEAD_FILE).write_bytes(models.head.SerializeToString())
    write_data(folder / graph_.DATA_FILE, models.stored, source)
    _prove(folder)
    places = graph_.offsets(models.stored)
    sizes = {places[item.name]: item.size_bytes for item in models.stored if item.sources}
    return Written(
        contract=contract,
        weight_bytes=sum(sizes.values()),
        table_bytes=sum(sizes[place] for place in graph_.only_looked_up(models.stored, source.tied)),
        cache_value_bytes=cache_value_bytes(spec),
        details=OnnxDetails(
            providers={name: "tested" if name in TESTED else "not run" for name in spec.providers},
            activations=activations,
            ops=_histogram(models.decoder),
            data_bytes=(folder / graph_.DATA_FILE).stat().st_size,
            tokenizer=compare_tokenizers(tokenizer, GENAI, folder / TOKENIZER, partial(genai_tokenizer, folder)),
            chat=_compare_chats(tokenizer, folder),
        ),
    )


def genai_config(
    arch: Architecture, contract: Contract, pad_id: int | None, providers: list[str], *, positions: bool
) -> dict[str, object]:
    """``genai_config.json``, with which onnxruntime-genai runs the same files; ``positions``: the graph takes them."""
    provider_options: list[dict[str, object]] = [{name: {}} for name in providers[:1] if name != "cpu"]
    past, present = "past_key_values.%d.", "present.%d."
    return {
        "model": {
            "type": "llama",  # to genai, a decoder of text: what it is made of stands in the graph
            "bos_token_id": contract.eos_ids[0] if contract.bos_id is None else contract.bos_id,
            "eos_token_id": contract.eos_ids,
            "pad_token_id": contract.eos_ids[0] if pad_id is None else pad_id,
            "context_length": contract.context_length,
            "vocab_size": contract.vocab_size,
            "decoder": {
                # Level 3: onnxruntime warns that the default of logits_index can be overridden, which is its purpose.
                "session_options": {"log_id": "edgekd", "log_severity_level": 3, "provider_options": provider_options},
                "filename": MAIN_FILE,
                "head_size": arch.head_dim,
                "hidden_size": arch.hidden,
                "num_attention_heads": arch.heads,
                "num_hidden_layers": arch.layers,
                "num_key_value_heads": arch.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": f"{past}key",
                    "past_value_names": f"{past}value",
                }
                | ({"position_ids": graph_.POSITIONS} if positions else {}),
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{present}key",
                    "present_value_names": f"{present}value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": contract.context_length, "past_present_share_buffer": True},
    }


def transformers_js_config(config: Mapping[str, object], activations: Real) -> dict[str, object]:
    """``config.json``, with which transformers.js runs the same files."""
    dtype = {"float32": "fp32", "float16": "fp16"}[activations]
    return {
        **config,
        "transformers.js_config": {"dtype": "fp32", "kv_cache_dtype": dtype, "use_external_data_format": True},
    }


def _compare_chats(tokenizer: PreTrainedTokenizerFast, folder: Path) -> ChatProof | None:
    """Whether onnxruntime-genai's own template engine renders chats as the tokenizer does; None without a template.

    Sessions are fed rendered text, so a difference touches those alone who render by genai.
    """
    import onnxruntime_genai

    if not chat_template(tokenizer):
        return None
    differ, first = 0, ""
    for chat in CHATS:
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        try:
            theirs = onnxruntime_genai.Tokenizer(str(folder))
            actual = theirs.apply_chat_template(messages=json.dumps(chat), add_generation_prompt=True)
        except Exception as error:  # RuntimeError, or what its template engine throws
            actual = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if actual != expected:
            differ += 1
            first = first or f"{actual!r:.200} instead of {expected!r:.200}"
    return ChatProof(chats=len(CHATS), differ=differ, first=first or None)


def _prove(folder: Path) -> None:
    """Check the graphs against the standard, and that onnxruntime has a kernel for every node and agrees with its
    types and shapes. Nothing is run: that would take the memory of the whole model.

    Raises:
        BadArtifact: the checker or onnxruntime refuses one.
    """
    import onnx

    for path in (folder / graph_.HEAD_FILE, folder / MAIN_FILE):
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise BadArtifact(f"{path.name}: {error}.", "Report this student's config.json.") from error
        load(path, "cpu", 1, light=True)


def _histogram(model: ModelProto) -> dict[str, int]:
    """How many nodes of each operator, those of other domains with their domain."""
    names = (f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph.node)
    return dict(sorted(Counter(names).items()))

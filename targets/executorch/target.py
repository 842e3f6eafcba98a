"""ExecuTorch for phones: fp16 and fp32 from the student, the portable grid from the quantized student as it is.

XNNPACK runs the whole decoder but for the embedding, the cache and attention, which ExecuTorch's own kernels run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ...architecture import Architecture
from ...checkpoint import Checkpoint
from ...errors import BadArtifact, EdgekdError, SpecError, Unsupported
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
    check_contract,
    check_installed,
    check_size,
    cores,
    details_of,
    main_file,
)
from ..shared.decoder import (
    DECODER_FEATURES,
    MAX_CACHE_BYTES,
    asked_for,
    check_features,
    check_head_dim,
    check_weights,
)
from ..shared.recipes import real_of
from ..shared.session import DecoderSession
from ..shared.source import plain_form
from ..shared.target import TargetOptions
from ..shared.tokenizer import TOKENIZER, SessionTokenizer, check_has_tokenizer, compare_tokenizers, contract_of
from .selftest import self_test
from .session import CHUNK, ExecutorchEngine, head_sha256, runner_tokenizer

if TYPE_CHECKING:
    from ...quant.recipe import Recipe

__all__ = ["EXTRA", "FEATURES", "PACKAGES", "TITLE", "Options", "check", "export", "open", "self_test"]

TITLE, EXTRA = "ExecuTorch", "executorch"
PACKAGES = ("executorch", "torch", "torchao")
MAIN_FILE = "model.pte"
_CACHE_BYTES = 4  # float32
FEATURES = DECODER_FEATURES
"""What the module has a place for."""
PROVIDERS = {"cpu": "tested", "vulkan": "not run"}
"""``cpu`` is XNNPACK."""


class Options(TargetOptions):
    """An ExecuTorch target."""

    providers: Annotated[list[Name], Field(min_length=1, max_length=16)] = Field(
        ["cpu"],
        description="The one to lower the program for: cpu, which is XNNPACK (tested), or vulkan (not run).",
    )


class ExecutorchDetails(Details):
    """What the manifest says of an ExecuTorch artifact."""

    providers: dict[str, str] = Field(min_length=1)
    """The one that the program is lowered for, and whether it was tested."""
    delegates: int = Field(ge=0)
    delegated: dict[str, int]
    """Nodes by operator, inside the delegates; and those outside."""
    undelegated: dict[str, int]
    undelegated_heavy: list[str]
    chunk_tokens: int = Field(ge=1)
    """Most tokens of a call."""
    cache_bytes: int = Field(ge=0)
    tokenizer: TokenizerProof
    file_bytes: int = Field(ge=0)
    head_bytes: int = Field(ge=0)
    """What the runtime parses, before the weights; and its sum."""
    head_sha256: str


def arithmetic(recipe: Recipe, asked: Mapping[str, object]) -> Arithmetic:
    """XNNPACK's dynamic quantization gives the inputs of a token one scale and one zero point."""
    if recipe.native:
        return "float32"
    return "int8 by token" if recipe.on_grid else "float16"


def check(config: Mapping[str, object], tokenizer_folder: Path, spec: Options) -> None:
    """Refuse what the exporter cannot write, from ``config.json`` and the tokenizer's files alone.

    Raises:
        SpecError: an unknown recipe or provider, or a context longer than the student's.
        Unsupported: an architecture, a setting or a head size that the exporter does not write, or a context whose
            cache is too large.
        EdgekdError: no tokenizer.
        MissingExtra: a package of the extra is not installed.
    """
    arch, context_length = asked_for(config, spec)
    if len(spec.providers) != 1 or spec.providers[0] not in PROVIDERS:
        raise SpecError(
            f"targets: providers {spec.providers} for executorch: a program is lowered for one, "
            f"{' or '.join(PROVIDERS)}."
        )
    if spec.providers == ["vulkan"] and "fp16" in spec.recipes:
        raise SpecError("targets: recipe 'fp16' for vulkan is not written yet; take executorch-fp32.")
    check_features(arch, FEATURES, TITLE, context_length)
    check_head_dim(arch)
    _check_cache(arch, context_length)
    check_has_tokenizer(tokenizer_folder)
    check_installed("executorch", "executorch", "torchao", "pytorch-tokenizers", "tokenizers")


def _check_cache(arch: Architecture, context_length: int) -> None:
    size = context_length * arch.kv_bytes(1, _CACHE_BYTES)  # a window saves nothing: all of it is kept
    if size > MAX_CACHE_BYTES:
        raise Unsupported(
            f"targets: the cache of {context_length} tokens takes {size / 2**30:.1f} GiB, which ExecuTorch allocates "
            "whole.",
            "Ask for a shorter context.",
        )


def export(
    student: Path,
    spec: Options,
    recipe: str,
    out_dir: Path,
    *,
    name: str,
    quantized: Path | None = None,
    moments: Path | None = None,  # of native recipes: ExecuTorch has none
) -> Artifact:
    """Write ``model.pte``, the tokenizer and the manifest; see ``targets.export``."""
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
        runtime="executorch",
        main_file=MAIN_FILE,
    )


def open(artifact: Artifact, *, threads: int | None = None) -> Session:
    """The artifact in ExecuTorch's runtime.

    Raises:
        BadArtifact: the file is not the one that was exported, or ExecuTorch refuses it.
        EdgekdError: a program for Vulkan.
        MissingExtra: ExecuTorch is not installed.
    """
    details, contract = details_of(artifact, ExecutorchDetails), artifact.manifest.contract
    path, tokenizer = main_file(artifact, MAIN_FILE), artifact.path(TOKENIZER)
    if "cpu" not in details.providers:
        raise EdgekdError(
            f"{artifact.folder}: the program is for {', '.join(details.providers)}, which is not run here.",
            "Run it on a phone, or export with providers: [cpu].",
        )
    check_size(path, details.file_bytes)
    if head_sha256(path, details.head_bytes) != details.head_sha256:  # a changed byte there may end the process
        raise BadArtifact(f"{path} is not the program that was exported.", "Export the artifact again.")
    encoder = partial(runner_tokenizer, tokenizer, contract) if details.tokenizer.used == "executorch" else None
    engine = ExecutorchEngine(path, cores(threads))
    check_contract(path, contract, engine.number("get_vocab_size"), engine.number("get_max_context_len"))
    return DecoderSession(engine, SessionTokenizer(tokenizer, "executorch", encoder), contract)


def cache_value_bytes(spec: Options) -> int:
    """Of a number in the cache, float32."""
    return _CACHE_BYTES


def _write(job: Job, spec: Options) -> Written:
    """Write everything but the manifest."""
    from .lower import lower
    from .model import Decoder, Weights, table_bytes
    from .pack import write_program

    checkpoint, folder = job.checkpoint, job.folder
    check_weights(checkpoint.architecture, job.source, TITLE)
    source, arch = plain_form(job.source, checkpoint.architecture)
    context, (provider,) = spec.context_of(arch.context_length), spec.providers
    tokenizer = load_tokenizer(checkpoint.folder)
    contract = contract_of(tokenizer, checkpoint.folder, arch.vocab_size, context)
    tokenizer.save_pretrained(folder)
    told = compare_tokenizers(
        tokenizer, "executorch", folder / TOKENIZER, partial(runner_tokenizer, folder / TOKENIZER, contract)
    )

    cpu = provider == "cpu"
    weights = Weights(source, real_of(job.recipe) if cpu else "float32", stand_ins=cpu)
    weights.check()
    decoder = Decoder(weights, arch, context).eval()
    lowered = lower(decoder, provider, runner_methods(arch, contract))
    if lowered.heavy:
        warnings.warn(
            f"{provider} does not run {', '.join(lowered.heavy)} of this model: generation will be slow.", stacklevel=2
        )
    written = write_program(folder / MAIN_FILE, lowered.manager, weights)
    return Written(
        contract=contract,
        weight_bytes=written.tensor_bytes - decoder.table_bytes,
        table_bytes=table_bytes(weights),
        cache_value_bytes=_CACHE_BYTES,
        details=ExecutorchDetails(
            providers={provider: PROVIDERS[provider]},
            delegates=lowered.delegates,
            delegated=lowered.delegated,
            undelegated=lowered.undelegated,
            undelegated_heavy=lowered.heavy,
            chunk_tokens=CHUNK,
            cache_bytes=context * arch.kv_bytes(1, _CACHE_BYTES),
            tokenizer=told,
            file_bytes=(folder / MAIN_FILE).stat().st_size,
            head_bytes=written.head_bytes,
            head_sha256=head_sha256(folder / MAIN_FILE, written.head_bytes),
        ),
    )


def runner_methods(arch: Architecture, contract: Contract) -> dict[str, object]:
    """The methods by which an app's runner learns what the program is."""
    bos = contract.eos_ids[0] if contract.bos_id is None else contract.bos_id
    return {
        "get_bos_id": bos,
        "get_eos_ids": contract.eos_ids,
        "get_vocab_size": contract.vocab_size,
        "get_n_layers": arch.layers,
        "get_max_context_len": contract.context_length,
        "get_max_seq_len": min(CHUNK, contract.context_length),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }

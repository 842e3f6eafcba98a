"""The spec of a run that trains nothing: a model that exists, on its way to devices."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import EdgekdError, MissingExtra, SpecError, Unsupported
from ..spec import DEFAULT_CONTEXT, BenchSpec, DataSpec, Method, Spec, TargetSpec, VerifySpec, of_options
from ..student import resolve_model
from ..targets import check, load_target, names

_RECIPE = "portable-int4"
_LOG = logging.getLogger(__name__)


def deployment(
    model: str,
    *,
    targets: Sequence[str] | None = None,
    recipes: Sequence[str] | None = None,
    bits: float | None = None,
    method: Method = "gptq",
    text: Path | None = None,
    context: int | None = None,
) -> Spec:
    """What ``edgekd deploy`` does, as a spec; lengths are cut to what the model and the context hold.

    Args:
        model: a folder, ``builtin:NAME`` or ``hub:ORGANISATION/NAME``.
        targets: None: those that are installed and take the model; the others are named in the log.

    Raises:
        EdgekdError: there is no such model, a named target refuses it, or all do.
    """
    folder = resolve_model(model)
    longest = Checkpoint(folder).decoder.max_position_embeddings
    most = context or min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if longest and most > longest:
        raise SpecError(f"--context {most}: the model holds {longest} tokens.", "Lower it.")
    wanted = {"recipes": list(recipes or [_RECIPE]), "context": most}
    sections = [of_options(load_target(name).Options, target=name, **wanted) for name in targets or names()]
    decode = min(64, most // 4) or 1
    prompts = sorted({min(tokens, most - decode) for tokens in (32, 256)})
    return of_options(
        Spec,
        name=_name(model),
        student={"init": "checkpoint", "model": model},
        data=_data(text, min(512, most)),
        quantize={"method": method, **({"bits": bits} if bits else {})},
        targets=list(_that_take(folder, sections, named=targets is not None)),
        verify=VerifySpec(context=min(256, most), greedy_tokens=min(32, most - 1)),
        bench=BenchSpec(prompt_tokens=prompts, decode_tokens=decode),
    )


def _data(text: Path | None, context: int) -> DataSpec:
    if text is None:
        return DataSpec(source="mixed", context=context)
    # A text of one's own may be short: each split must get some.
    return DataSpec(source="text", paths=[str(text)], context=context, validation_share=0.2, test_share=0.2)


def _name(model: str) -> str:
    """The run's name: the last part of the model's, as a spec allows it."""
    last = Path(model.rpartition(":")[2]).resolve().name.partition("@")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:100] or "model"


def _that_take(folder: Path, sections: Sequence[TargetSpec], *, named: bool) -> Iterator[TargetSpec]:
    config, refused = Checkpoint(folder).config, list[EdgekdError]()
    for section in sections:
        try:
            check(config, folder, section)
        except (Unsupported, MissingExtra) as error:
            if named:
                raise
            refused.append(error)
            _LOG.warning("%s is left out: %s", section.target, error)
        else:
            yield section
    if len(refused) == len(sections):
        raise refused[0]

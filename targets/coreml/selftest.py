"""A tiny model, packed and run."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

from ...architecture import read_architecture
from ..shared.selftest import check_agreement, quantized_llama
from ..shared.source import plain_form

_PROMPT = 48


def self_test() -> str:
    """Write a tiny int4 model as a Core ML package and run it: in Core ML on macOS, in the interpreter elsewhere."""
    import numpy as np
    import torch

    from ...quant.store.reader import load_dequantized
    from . import graph as graph_
    from .pack import write_package
    from .session import open_runner, stand_in, step_inputs

    ids = np.random.default_rng(1).integers(64, size=_PROMPT).tolist()
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "model.mlpackage"
        quantized = quantized_llama(
            Path(name),
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=_PROMPT,
            initializer_range=0.2,
        )
        weights, arch = plain_form(quantized, read_architecture(quantized.config))
        settings = graph_.Settings(dict(quantized.kinds), quantized.tied, _PROMPT)
        graph = graph_.build(arch, settings)
        write_package(package, graph, graph_.describe(arch, settings, {}), weights)
        runner, half = open_runner(package), _PROMPT // 2
        pieces = [runner.run(step_inputs(ids[i : i + half], i, all_logits=True))[0] for i in (0, half)]  # (T, V)
        with torch.no_grad():
            expected = load_dequantized(quantized)(torch.tensor([ids])).logits[0].numpy()
    check_agreement(pieces, expected, "the package's logits and the model's disagree")
    by = stand_in() or "Core ML"
    return f"coremltools {version('coremltools')}: an int4 model was converted, and agrees as run by {by}"

"""A tiny model, lowered and run."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

from ...architecture import read_architecture
from ..shared.selftest import check_agreement, quantized_llama
from ..shared.source import plain_form

_HIDDEN, _MLP, _VOCAB, _HEADS, _PROMPT = 256, 512, 512, 4, 48


def self_test() -> str:
    """Lower a tiny model on the grid to XNNPACK, and run it over a prompt at once and token by token."""
    import numpy as np
    import torch

    from ...quant.store.reader import load_dequantized
    from .lower import lower
    from .model import Decoder, Weights
    from .pack import write_program
    from .session import ExecutorchEngine

    ids = np.random.default_rng(1).integers(_VOCAB, size=_PROMPT).tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = quantized_llama(
            folder,
            vocab_size=_VOCAB,
            hidden_size=_HIDDEN,
            intermediate_size=_MLP,
            num_hidden_layers=1,
            num_attention_heads=_HEADS,
            num_key_value_heads=_HEADS,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
        source, arch = plain_form(opened, read_architecture(opened.config))
        weights = Weights(source, "float16", stand_ins=True)
        lowered = lower(Decoder(weights, arch, arch.context_length).eval(), "cpu", {})
        write_program(folder / "model.pte", lowered.manager, weights)
        with torch.no_grad():
            expected = load_dequantized(opened)(input_ids=torch.tensor([ids])).logits[0].numpy()  # (T, V)
        engine = ExecutorchEngine(folder / "model.pte", 1)
        whole = engine.feed_all(ids, 0)
        single = np.stack([engine.feed([token], i) for i, token in enumerate(ids)])
    check_agreement(whole, expected, "ExecuTorch's logits and the weights disagree")
    check_agreement(whole, single, "ExecuTorch's prefill and decode disagree")
    return (
        f"executorch {version('executorch')}: an int4 program was lowered to XNNPACK; prefill of {_PROMPT} "
        "tokens and decode agree"
    )

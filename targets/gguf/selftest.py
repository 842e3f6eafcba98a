"""A quantized model of random weights in llama.cpp."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..shared.selftest import check_agreement

_HIDDEN, _MLP, _VOCAB, _LAYERS, _HEADS, _PROMPT = 256, 512, 512, 2, 4, 48


def write_random_gguf(path: Path, embedding: str = "Q8_0", weights: str = "Q4_0") -> None:
    """A two-layer Llama of random quantized weights, wide enough that llama.cpp takes its SIMD and AMX kernels.

    Args:
        path: file to write.
        embedding: ggml type of embedding and head.
        weights: ggml type of the linear layers.
    """
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_MLP)
    writer.add_block_count(_LAYERS)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, kind: str) -> None:
        values = (rng.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)
        tensor_type = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(values, tensor_type), raw_dtype=tensor_type)

    add("token_embd.weight", _VOCAB, _HIDDEN, embedding)
    add("output.weight", _VOCAB, _HIDDEN, embedding)
    writer.add_tensor("output_norm.weight", np.ones(_HIDDEN, np.float32))
    for layer in range(_LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(_HIDDEN, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", _HIDDEN, _HIDDEN, weights)
        for name, rows, columns in (
            ("ffn_gate", _MLP, _HIDDEN),
            ("ffn_up", _MLP, _HIDDEN),
            ("ffn_down", _HIDDEN, _MLP),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def self_test() -> str:
    """Prefill a quantized model in llama.cpp, and again token by token: both kernels must agree."""
    import llama_cpp
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        write_random_gguf(path)
        model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
        ids = np.random.default_rng(1).integers(_VOCAB, size=_PROMPT).tolist()
        model.eval(ids)
        whole = model.scores[:_PROMPT].copy()  # (T, V)
        model.reset()
        for token in ids:
            model.eval([token])
        single = model.scores[:_PROMPT].copy()
        model.close()
    check_agreement(whole, single, "llama.cpp's prefill and decode disagree", least=0.99)
    return f"llama-cpp-python {llama_cpp.__version__}: Q4_0 and Q8_0 prefill of {_PROMPT} tokens and decode agree"

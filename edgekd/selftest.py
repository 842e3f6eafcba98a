"""Small proofs that a runtime works here, each to be run in a process of its own: ``python -m edgekd.selftest NAME``.

A broken build ends its process by a signal, without a message; so ``doctor`` runs this file as a child and reads one
JSON line from it. Nothing is written but a temporary folder.

Shapes follow each runtime; ``T`` tokens of a prompt, ``V`` vocabulary size.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .quant.folder import Grid

_HIDDEN, _MLP, _VOCAB, _LAYERS, _HEADS, _PROMPT = 256, 512, 512, 2, 4, 48


def training() -> str:
    """One step of gradient descent on a tiny transformer, in float32 and bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    ids = torch.arange(32)[None]
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss in {dtype} is {loss.item()}")
    return "a tiny model was trained for a step in float32 and in bfloat16"


def grid() -> str:
    """Quantize a tiny model by GPTQ, read its integers back, and take one step of quantization-aware training."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from .distill.qad import QuantizedStudent
    from .quant.folder import load_dequantized, open_grid
    from .quant.quantize import quantize
    from .targets import load_recipe

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model, ids = LlamaForCausalLM(config), torch.arange(64).view(2, 32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "student")
        quantize(folder / "student", folder / "grid", load_recipe("portable-int4-head4"), method="gptq", ids=ids)
        opened = open_grid(folder / "grid")
        scales = {name: pair[1] for name in opened.names() if (pair := opened.int4(name))}
        dequantized = load_dequantized(opened)
    student = QuantizedStudent(dequantized, opened.kinds, scales)
    with torch.no_grad():
        if not torch.equal(student(input_ids=ids).logits, dequantized(input_ids=ids).logits):
            raise RuntimeError("fake quantization does not give the grid's own values")
    loss = student(input_ids=ids, labels=ids).loss
    loss.backward()
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters()):
        raise RuntimeError("gradients of the quantized model are not finite")
    return "a tiny model was quantized by GPTQ, read back bit for bit, and trained for a step on the grid"


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


def gguf() -> str:
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
    if not np.isfinite(whole).all() or not np.isfinite(single).all():
        raise RuntimeError("llama.cpp's logits are not finite")
    similar = float(np.corrcoef(whole.ravel(), single.ravel())[0, 1])
    if similar < 0.99:
        raise RuntimeError(f"llama.cpp's prefill and decode disagree: the correlation of their logits is {similar:.3f}")
    return f"llama-cpp-python {llama_cpp.__version__}: Q4_0 and Q8_0 prefill of {_PROMPT} tokens and decode agree"


def _random_attention(codes: Any, scales: Any) -> bytes:
    """A graph: ``x (1, S, E)`` through an int4 projection to query, key and value, and attention with a cache."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    head, real, whole = _HIDDEN // _HEADS, TensorProto.FLOAT, TensorProto.INT32
    angles = np.arange(_PROMPT, dtype=np.float32)[:, None] / 10 ** np.arange(head // 2, dtype=np.float32)
    tables = {"codes": codes, "scales": scales, "cos": np.cos(angles), "sin": np.sin(angles)}
    nodes = [
        helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["qkv"],
            domain="com.microsoft",
            K=_HIDDEN,
            N=3 * _HIDDEN,
            bits=4,
            block_size=32,
            accuracy_level=4,
        ),
        helper.make_node(
            "GroupQueryAttention",
            ["qkv", "", "", "past_key", "past_value", "last", "total", "cos", "sin"],
            ["y", "key", "value"],
            domain="com.microsoft",
            num_heads=_HEADS,
            kv_num_heads=_HEADS,
            do_rotary=1,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [
            helper.make_tensor_value_info("x", real, [1, "S", _HIDDEN]),
            *(helper.make_tensor_value_info(f"past_{n}", real, [1, _HEADS, "P", head]) for n in ("key", "value")),
            helper.make_tensor_value_info("last", whole, [1]),
            helper.make_tensor_value_info("total", whole, []),
        ],
        [helper.make_tensor_value_info(name, real, None) for name in ("y", "key", "value", "qkv")],
        [numpy_helper.from_array(value, name) for name, value in tables.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()


def onnx() -> str:
    """An int4 projection against its dequantized weights, then attention over a prompt at once and token by token."""
    import numpy as np
    import onnxruntime
    import onnxruntime_genai

    rng = np.random.default_rng(0)
    q = rng.integers(-8, 8, (3 * _HIDDEN, _HIDDEN), dtype=np.int8)
    scales = rng.uniform(0.01, 0.02, (3 * _HIDDEN, _HIDDEN // 32)).astype(np.float32)
    codes = (q + 8).astype(np.uint8).reshape(*scales.shape, 16, 2)
    model = _random_attention(codes[..., 0] | (codes[..., 1] << 4), scales)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def step(x: Any, past: list[Any]) -> list[Any]:
        total = past[0].shape[2] + x.shape[1]
        lengths = {"last": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}
        return session.run(None, {"x": x, "past_key": past[0], "past_value": past[1], **lengths})

    x = rng.standard_normal((1, _PROMPT, _HIDDEN)).astype(np.float32)
    empty = [np.zeros((1, _HEADS, 0, _HIDDEN // _HEADS), np.float32)] * 2
    whole, _, _, qkv = step(x, empty)
    expected = x[0] @ (q.reshape(*scales.shape, 32) * scales[..., None]).reshape(q.shape).T
    if (similar := float(np.corrcoef(qkv.ravel(), expected.ravel())[0, 1])) < 0.999:
        raise RuntimeError(f"onnxruntime's int4 product and the weights disagree: the correlation is {similar:.3f}")
    past, single = empty, []
    for t in range(_PROMPT):
        y, *past, _ = step(x[:, t : t + 1], past)
        single.append(y[0, 0])
    if (similar := float(np.corrcoef(whole.ravel(), np.ravel(single))[0, 1])) < 0.999:
        raise RuntimeError(f"onnxruntime's prefill and decode disagree: the correlation is {similar:.3f}")
    return (
        f"onnxruntime {onnxruntime.__version__}: int4 prefill of {_PROMPT} tokens and decode agree; onnxruntime-genai "
        f"{onnxruntime_genai.__version__} loads"
    )


def _quantized_llama(folder: Path, **settings: Any) -> Grid:
    """A random tied Llama on the portable grid."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from .quant.folder import open_grid
    from .quant.quantize import quantize
    from .targets import load_recipe

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **settings))
    model.save_pretrained(folder / "student")
    quantize(folder / "student", folder / "grid", load_recipe("portable-int4"))
    return open_grid(folder / "grid")


def executorch() -> str:
    """Lower a tiny model on the grid to XNNPACK, and run it over a prompt at once and token by token."""
    import numpy as np
    import torch

    from .quant.folder import load_dequantized
    from .targets.executorch.lower import lower
    from .targets.executorch.model import Decoder, Weights
    from .targets.executorch.pack import write_program
    from .targets.executorch.session import ExecutorchEngine
    from .targets.shared.decoder import read_config

    ids = np.random.default_rng(1).integers(_VOCAB, size=_PROMPT).tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = _quantized_llama(
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
        weights = Weights(opened, "float16", stand_ins=True)
        arch = read_config(opened.config, "ExecuTorch")
        lowered = lower(Decoder(weights, arch, arch.context_length).eval(), "cpu", {})
        write_program(folder / "model.pte", lowered.manager, weights)
        with torch.no_grad():
            expected = load_dequantized(opened)(input_ids=torch.tensor([ids])).logits[0].numpy()  # (T, V)
        engine = ExecutorchEngine(folder / "model.pte", 1)
        whole = engine.feed_all(ids, 0)
        single = np.stack([engine.feed([token], i) for i, token in enumerate(ids)])
    if (similar := float(np.corrcoef(whole.ravel(), expected.ravel())[0, 1])) < 0.999:
        raise RuntimeError(f"ExecuTorch's logits and the weights disagree: the correlation is {similar:.3f}")
    if (similar := float(np.corrcoef(whole.ravel(), single.ravel())[0, 1])) < 0.999:
        raise RuntimeError(f"ExecuTorch's prefill and decode disagree: the correlation is {similar:.3f}")
    return (
        f"executorch {metadata.version('executorch')}: an int4 program was lowered to XNNPACK; prefill of {_PROMPT} "
        "tokens and decode agree"
    )


def coreml() -> str:
    """Write a tiny int4 model as a Core ML package and run it: in Core ML on macOS, in the interpreter elsewhere."""
    import numpy as np
    import torch

    from .quant.folder import load_dequantized
    from .targets import stand_in
    from .targets.coreml import graph as graph_
    from .targets.coreml.pack import write_package
    from .targets.coreml.session import open_runner, step_inputs
    from .targets.shared.decoder import read_config

    ids = np.random.default_rng(1).integers(64, size=_PROMPT).tolist()
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "model.mlpackage"
        grid = _quantized_llama(
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
        arch = read_config(grid.config, "Core ML")
        settings = graph_.Settings(dict(grid.kinds), grid.tied, _PROMPT)
        graph = graph_.build(arch, settings)
        write_package(package, graph, graph_.describe(arch, settings, {}), grid, arch)
        runner, half = open_runner(package), _PROMPT // 2
        pieces = [runner.run(step_inputs(ids[i : i + half], i, all_logits=True))[0] for i in (0, half)]  # (T, V)
        with torch.no_grad():
            expected = load_dequantized(grid)(torch.tensor([ids])).logits[0].numpy()
    if (similar := float(np.corrcoef(np.ravel(pieces), expected.ravel())[0, 1])) < 0.999:
        raise RuntimeError(f"the package's logits and the model's disagree: their correlation is {similar:.3f}")
    by = stand_in("coreml") or "Core ML"
    return f"coremltools {metadata.version('coremltools')}: an int4 model was converted, and agrees as run by {by}"


TESTS: dict[str, Callable[[], str]] = {
    "training": training,
    "grid": grid,
    "gguf": gguf,
    "onnx": onnx,
    "executorch": executorch,
    "coreml": coreml,
}
MODULES = {
    "training": ("torch", "transformers"),
    "grid": ("torch", "transformers", "accelerate"),
    "gguf": ("gguf", "llama_cpp"),
    "onnx": ("onnx", "onnxruntime", "onnxruntime_genai"),
    "executorch": ("executorch", "torchao", "torch", "transformers"),
    "coreml": ("coremltools", "torch", "transformers", "tokenizers"),
}
"""What each test imports, to tell a runtime that is absent from one that does not load."""


def main(name: str) -> None:
    """Print one JSON line: ``{"ok": detail}`` or ``{"failed": reason}``."""
    try:
        answer = {"ok": TESTS[name]()}
    except Exception as error:  # a runtime may raise anything; doctor wants one sentence
        lines = str(error).strip().splitlines()
        answer = {"failed": f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"}
    print("\n" + json.dumps(answer), flush=True)


def absent(name: str) -> list[str]:
    """Modules of a test that are not installed; nothing is imported but their parents."""
    return [module for module in MODULES[name] if importlib.util.find_spec(module) is None]


if __name__ == "__main__":
    main(sys.argv[1])

"""A projection and attention of random weights in onnxruntime."""

from __future__ import annotations

from typing import Any

from ..shared.selftest import check_agreement

_HIDDEN, _HEADS, _PROMPT = 256, 4, 48


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


def self_test() -> str:
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
    check_agreement(qkv, expected, "onnxruntime's int4 product and the weights disagree")
    past, single = empty, []
    for t in range(_PROMPT):
        y, *past, _ = step(x[:, t : t + 1], past)
        single.append(y[0, 0])
    check_agreement(whole, single, "onnxruntime's prefill and decode disagree")
    return (
        f"onnxruntime {onnxruntime.__version__}: int4 prefill of {_PROMPT} tokens and decode agree; onnxruntime-genai "
        f"{onnxruntime_genai.__version__} loads"
    )

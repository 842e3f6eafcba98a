"""Small proofs that a runtime works here, each to be run in a process of its own: ``python -m edgekd.selftest NAME``.

A broken build ends its process by a signal, without a message; so ``doctor`` runs this file as a child and reads one
JSON line from it. Nothing is written but a temporary folder. Training and quantization
are tested here, a runtime by its target.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from .errors import NoGpu


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


def quantization() -> str:
    """Quantize a tiny model by GPTQ, read its integers back, and take one step of quantization-aware training."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from .distill.qad import FakeQuantized
    from .quant.quantize import quantize
    from .quant.store.reader import load_dequantized, open_quantized
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
        quantize(folder / "student", folder / "quantized", load_recipe("portable-int4-head4"), method="gptq", ids=ids)
        opened = open_quantized(folder / "quantized")
        scales = {name: opened.integers(name)[1] for name, kind in opened.kinds.items() if kind == "int4"}
        dequantized = load_dequantized(opened)
    student = FakeQuantized(dequantized, opened.kinds, scales)
    with torch.no_grad():
        if not torch.equal(student(input_ids=ids).logits, dequantized(input_ids=ids).logits):
            raise RuntimeError("fake quantization does not give the grid's own values")
    loss = student(input_ids=ids, labels=ids).loss
    loss.backward()
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters()):
        raise RuntimeError("gradients of the quantized model are not finite")
    return "a tiny model was quantized by GPTQ, read back bit for bit, and trained for a step on the grid"


def gpu_of_training() -> str:
    """The GPU that torch trains on: the teacher and the student are moved there.

    Raises:
        NoGpu: there is none; how to get one.
    """
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({'ROCm' if torch.version.hip else 'CUDA'})"
    if torch.backends.mps.is_available():
        return "Apple's GPU (MPS)"
    raise NoGpu(f"torch {torch.__version__} has no GPU", "Install a torch for it, where there is one.")


TESTS = {"training": training, "quantization": quantization}
"""What needs no target. Each target has its own."""


def main(name: str) -> None:
    """Print one JSON line: ``{"ok": detail}``, ``{"missing": module}``, ``{"failed": reason}``, or of a GPU that is not
    there ``{"not_here": reason, "remedy": remedy}``."""
    try:
        answer = {"ok": _run(name)}
    except NoGpu as error:
        answer = {"not_here": error.cause, "remedy": error.remedy}
    except Exception as error:  # a runtime may raise anything; doctor wants one sentence
        if (module := absent_module(error)) is not None:
            answer = {"missing": module}
        else:
            lines = str(error).strip().splitlines()
            answer = {"failed": f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"}
    print("\n" + json.dumps(answer), flush=True)


def _run(name: str) -> str:
    if name in TESTS:
        return TESTS[name]()
    if name == "gpu training":
        return gpu_of_training()
    from .targets import describe_gpus, load_target

    if name.startswith("gpu "):
        return describe_gpus(name.removeprefix("gpu "))
    return load_target(name).self_test()


def absent_module(error: Exception) -> str | None:
    """The package that is not installed; None where it is another fault, such as a part that a package lacks."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return name if name and "." not in name else None


if __name__ == "__main__":
    main(sys.argv[1])

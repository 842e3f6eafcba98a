"""Artifacts with a proof, made by hand, for what chooses, predicts and compares."""

from __future__ import annotations

from typing import Any

import pytest

from edgekd.manifest import Traffic, write_artifact
from edgekd.proof import Benchmark, Parity

CONTRACT = {
    "context_length": 4096,
    "vocab_size": 257,
    "bos_id": None,
    "eos_ids": [256],
    "add_bos": False,
    "chat_template": None,
}


def measured(value: float, *samples: float) -> dict[str, Any]:
    return {"value": value, "source": "measured:clock", "samples": list(samples or (value,))}


@pytest.fixture
def make_artifact(tmp_path):
    """An artifact: its bytes, what a token reads, and what was measured of it."""

    def make(name: str, *, size=1000, read=None, top1=None, benchmark=None, failures=(), target="gguf"):
        folder = tmp_path / "artifacts" / name
        folder.mkdir(parents=True)
        (folder / "model.bin").write_bytes(name.encode().ljust(size, b"\0"))
        parity = None
        if top1 is not None:
            found = {"windows": 1, "window_tokens": 8, "unusable_positions": 0, "top1_agreement": top1}
            parity = Parity.model_validate(found | {"failures": list(failures)})
        return write_artifact(
            folder,
            name=name,
            target=target,
            recipe="r",
            runtime="llama.cpp",
            main_file="model.bin",
            student_digest="0",
            parameters=10**9,
            bits_per_weight=8.0,
            traffic=None if read is None else Traffic(weight_bytes=read, kv_bytes_per_position=1000),
            contract=CONTRACT,
            versions={},
            parity=parity,
            benchmark=None if benchmark is None else Benchmark.model_validate(benchmark),
        )

    return make

"""A target of another distribution: Qwen3 in NumPy, which keeps no cache and computes the whole text again each time.

Shapes: ``T`` tokens, ``E`` channels, ``H`` heads of size ``D``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file, save_file

from edgekd.errors import Unsupported
from edgekd.manifest import Artifact
from edgekd.student import load_tokenizer
from edgekd.targets.shared.artifact import Details, Job, Written, build_artifact, main_file
from edgekd.targets.shared.recipes import load_recipe
from edgekd.targets.shared.session import DecoderSession
from edgekd.targets.shared.target import TargetOptions
from edgekd.targets.shared.tokenizer import TOKENIZER, SessionTokenizer, contract_of

TITLE, EXTRA = "Toy Runtime", ""
PACKAGES = ("numpy",)
MAIN_FILE = "weights.safetensors"


class Options(TargetOptions):
    """A toy target."""

    colour: str = Field("red", description="Of the toy.")


class ToyDetails(Details):
    colour: str


def check(config: Mapping[str, Any], tokenizer_folder: Path, spec: Options) -> None:
    for recipe in spec.recipes:
        if load_recipe(recipe, "toy").name != "fp16":
            raise Unsupported(f"targets: the toy has no recipe {recipe!r}.", "Take fp16.")
    if config["model_type"] != "qwen3":
        raise Unsupported("the toy is Qwen3 alone.", "Use another student.")


def export(
    student: Path,
    spec: Options,
    recipe: str,
    out_dir: Path,
    *,
    name: str,
    quantized: Path | None = None,
    moments: Path | None = None,
) -> Artifact:
    def write(job: Job) -> Written:
        weights = {name: job.source.tensor(name).float().numpy() for name in job.source.kinds}
        save_file(weights, job.folder / MAIN_FILE)
        tokenizer, config = load_tokenizer(student), job.checkpoint.config
        (job.folder / "config.json").write_text(json.dumps(config))
        tokenizer.save_pretrained(job.folder)
        return Written(
            contract=contract_of(
                tokenizer, student, config["vocab_size"], spec.context or config["max_position_embeddings"]
            ),
            weight_bytes=sum(weight.nbytes for weight in weights.values()),
            table_bytes=0,
            cache_value_bytes=0,
            details=ToyDetails(colour=spec.colour),
        )

    told = {"name": name, "title": TITLE, "packages": PACKAGES, "runtime": "NumPy", "main_file": MAIN_FILE}
    return build_artifact(student, spec, recipe, out_dir, quantized, write, **told)


def open(artifact: Artifact, *, threads: int | None = None) -> DecoderSession:
    config = json.loads(artifact.path("config.json").read_text())
    engine = Engine(load_file(main_file(artifact, MAIN_FILE)), config)
    return DecoderSession(engine, SessionTokenizer(artifact.path(TOKENIZER), EXTRA), artifact.manifest.contract)


def self_test() -> str:
    x = np.arange(4.0).reshape(2, 2)
    if not np.array_equal(x @ np.eye(2), x):
        raise RuntimeError("NumPy cannot multiply")
    return "NumPy multiplies"


class Engine:
    def __init__(self, weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        self.weights, self.config, self.ids = weights, config, np.zeros(0, int)

    def feed(self, ids: Sequence[int], start: int) -> np.ndarray:
        return self.feed_all(ids, start)[-1]

    def feed_all(self, ids: Sequence[int], start: int) -> np.ndarray:
        self.ids = np.concatenate([self.ids[:start], np.asarray(ids, int)])
        return logits(self.weights, self.config, self.ids)[start:]

    def reset(self) -> None:
        pass

    def close(self) -> None:
        self.weights = {}


def logits(weights: dict[str, np.ndarray], config: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    """Logits ``(T, V)`` of ids ``(T,)``."""
    normed = partial(norm, eps=config["rms_norm_eps"])
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        w = {n.split(f".{layer}.")[1]: v for n, v in weights.items() if n.startswith(f"model.layers.{layer}.")}
        x = x + attention(normed(x, w["input_layernorm.weight"]), w, config, normed)
        y = normed(x, w["post_attention_layernorm.weight"])
        gate = y @ w["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return (normed(x, weights["model.norm.weight"]) @ head.T).astype(np.float32)


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def attention(x: np.ndarray, w: dict[str, np.ndarray], config: dict[str, Any], normed: Any) -> np.ndarray:
    heads, size = config["num_attention_heads"], config["head_dim"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]

    def split(name: str) -> np.ndarray:  # (H, T, D)
        return (x @ w[f"self_attn.{name}_proj.weight"].T).reshape(len(x), -1, size).swapaxes(0, 1)

    angles = np.arange(len(x))[:, None] / theta ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles), np.sin(angles)

    def turned(y: np.ndarray) -> np.ndarray:
        a, b = np.split(y, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    q, k = (turned(normed(split(n), w[f"self_attn.{n}_norm.weight"])) for n in "qk")
    k, v = (np.repeat(y, heads // len(y), 0) for y in (k, split("v")))
    scores = q @ k.swapaxes(1, 2) / size**0.5 + np.triu(np.full((len(x), len(x)), -np.inf), 1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = shares / shares.sum(-1, keepdims=True) @ v
    return mixed.swapaxes(0, 1).reshape(len(x), -1) @ w["self_attn.o_proj.weight"].T

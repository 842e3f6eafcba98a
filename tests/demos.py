"""What the tests of the demos share: artifacts of the shipped teacher with golden answers, tools, and llama.cpp."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgekd import targets
from edgekd.bundle import Platform, public_key, write_bundle
from edgekd.manifest import Artifact, add_proof
from edgekd.proof import Parity
from edgekd.spec import TargetSpec
from edgekd.student import load_tokenizer, resolve_model
from edgekd.verify.golden import golden_answers, golden_texts

ROOT = Path(__file__).parent.parent
CONTEXT = 512
IDS = [300, 400, 500, 20, 30]
QUESTION = "Größe 世界 <|im_end|> def f(x):"


def tool(*names: str, get: str) -> str:
    """The path of a program, by the first of its names that is here; else the test is skipped.

    Args:
        get: how to get it.
    """
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed: {get}")
    return found


def llama_cpp() -> tuple[Path, Path]:
    """The folders of headers and libraries of this machine's llama.cpp; where there are none, the test is skipped."""
    package = Path(pytest.importorskip("llama_cpp").__file__).parent
    include = package.parent / "include"
    if not (include / "llama.h").is_file():
        pytest.skip(f"{include} has no llama.h")
    return include, package / "lib"


def make_artifact(target: str, out: Path) -> Artifact:
    """The shipped teacher, quantized by rounding, for one target; its golden answers are by its own runtime."""
    teacher = resolve_model("builtin:pycode-16m")
    spec = TargetSpec(target=target, recipes=["portable-int4"], context=CONTEXT)
    artifact = targets.export(teacher, spec, "portable-int4", out, name="pycode")
    ids = load_tokenizer(teacher)(inspect.getsource(inspect)[:20_000], verbose=False)["input_ids"]
    session = targets.open_artifact(artifact, threads=1)
    golden = golden_answers(session, artifact.manifest.contract.eos_ids, np.array(ids[:1280]).reshape(16, 80))
    session.close()
    return add_proof(artifact, parity=Parity(windows=0, window_tokens=0, unusable_positions=0, golden=golden))


def make_bundle(artifact: Artifact, out: Path, platform: Platform) -> str:
    """An artifact's signed bundle; the public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    session = targets.open_artifact(artifact, threads=1)
    golden = golden_texts(session, artifact.manifest.contract)
    session.close()
    write_bundle(artifact, out, platform, license_file=ROOT / "LICENSE", golden=golden, key=key)
    return public_key(key)

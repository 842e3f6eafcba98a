"""Artifacts on the arm64 instruction set, under qemu's user mode, against this machine on the same windows.

Judged by KL: two builds of one runtime for x86 differ by KL 0.003 too, so that equal tokens would be the wrong gate.
"""

from __future__ import annotations

import inspect
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cases import mean_kl
from demos import ROOT, make_artifact, tool
from edgekd import targets
from edgekd.manifest import Artifact, load_artifact
from edgekd.session import Session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is arm64 itself"),
]
BUILT = ROOT / "build/arm64"
MOST_KL = 0.01
WINDOWS, WINDOW, BEGIN = 6, 64, 32
QUICKSTART = Path(os.environ.get("EDGEKD_QUICKSTART", ROOT / "runs/quickstart"))


def command(target: str) -> list[str]:
    """The program for a target, under qemu."""
    qemu = tool("qemu-aarch64-static", "qemu-aarch64", get="make test-arm64")
    # SVE has kernels of its own, which few phones reach.
    emulated = [qemu, "-cpu", "max,sve=off"]
    needed = BUILT / ("site/onnxruntime" if target == "onnx" else f"{target}_logits")
    if not needed.exists():
        pytest.skip(f"{needed.relative_to(ROOT)} is missing: make test-arm64")
    if target == "onnx":
        python = BUILT / "root/usr/bin/python3.11"
        given = [f"PYTHONPATH={BUILT / 'site'}", f"PYTHONHOME={BUILT / 'root/usr'}", "PYTHONDONTWRITEBYTECODE=1"]
        emulated += ["-L", str(BUILT / "root"), *(word for one in given for word in ("-E", one))]
        return [*emulated, str(python), str(ROOT / "tests/arm64/onnx_logits.py")]
    return [*emulated, "-L", "/usr/aarch64-linux-gnu", str(needed)]


@pytest.fixture(scope="module", params=["gguf", "executorch", "onnx"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The quickstart's where it has been run, else the shipped teacher's."""
    command(request.param)
    made = QUICKSTART / f"artifacts/{request.param}-portable-int4"
    if made.is_dir():
        return load_artifact(made)
    return make_artifact(request.param, tmp_path_factory.mktemp("artifact") / request.param)


@pytest.fixture(scope="module")
def windows(artifact: Artifact) -> np.ndarray:
    """Ids of the standard library's source."""
    session = targets.open_artifact(artifact, threads=1)
    ids = session.tokenize(inspect.getsource(inspect)[20_000:30_000])[: WINDOWS * WINDOW]
    session.close()
    return np.array(ids, np.int32).reshape(WINDOWS, WINDOW)


@pytest.fixture(scope="module")
def expected(artifact: Artifact, windows: np.ndarray) -> np.ndarray:
    """This machine's logits."""
    session = targets.open_artifact(artifact, threads=1)
    rows = [row for window in windows.tolist() for row in read(session, window)]
    session.close()
    return np.array(rows, np.float64)


def read(session: Session, window: list[int]) -> list[np.ndarray]:
    """Logits behind the beginning of a window, and behind each token that follows."""
    session.reset()
    return [session.prefill(window[:BEGIN]).copy(), *(session.decode(token).copy() for token in window[BEGIN:])]


def on_arm64(target: str, model: Path, windows: np.ndarray, folder: Path) -> np.ndarray:
    """The same logits by the arm64 build of the runtime."""
    windows.tofile(folder / "ids")
    words = [*command(target), model, folder / "ids", WINDOW, BEGIN, folder / "logits"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.returncode} {done.stderr[-2000:]}"
    logits = np.fromfile(folder / "logits", np.float32).astype(np.float64)
    return logits.reshape(WINDOWS * (WINDOW - BEGIN + 1), -1)


def test_arm64_computes_the_same(artifact: Artifact, windows: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    found = on_arm64(artifact.manifest.target, artifact.main_file, windows, tmp_path)
    apart = mean_kl(expected, found)
    same = float((expected.argmax(-1) == found.argmax(-1)).mean())
    print(f"{artifact.folder.name}: KL {apart:.2g}, the same likeliest token at {same:.1%} of {len(found)} positions")
    assert apart <= MOST_KL


def test_other_weights_are_seen(artifact: Artifact, windows: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    """The top bit of every nibble in one fiftieth of the weights."""
    main, manifest = artifact.main_file, artifact.manifest
    weights = max(manifest.files, key=lambda name: artifact.path(name).stat().st_size)
    for name in {manifest.main_file, weights}:
        shutil.copyfile(artifact.path(name), tmp_path / name)
    data = np.fromfile(tmp_path / weights, np.uint8)
    data[len(data) * 70 // 100 : len(data) * 72 // 100] ^= 0x88
    data.tofile(tmp_path / weights)
    apart = mean_kl(expected, on_arm64(manifest.target, tmp_path / main.name, windows, tmp_path))
    print(f"{artifact.folder.name}: KL {apart:.2g} with other weights")
    assert not apart <= MOST_KL

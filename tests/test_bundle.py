"""``edgekd bundle``: what is in it, and that whoever verifies it sees every change."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgekd import targets
from edgekd.bundle import LIMITS, SIGNATURE, SUMS, check_bundle, check_folder, exceeded, write_bundle
from edgekd.cli import app
from edgekd.conversation import chat_ids, render_chat, text_ids
from edgekd.errors import BadArtifact, EdgekdError
from edgekd.manifest import Artifact, load_artifact
from edgekd.proof import GoldenAnswer, Parity

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = tmp_path_factory.mktemp("key") / "key.pem"
    private = Ed25519PrivateKey.generate()
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def run(*words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from edgekd.cli import main; main()", "bundle", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tiny_gguf: Artifact, key: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("made") / "bundle"
    (out.parent / "LICENSE.txt").write_text("Do as you like.\n")
    words = ["--for", "android", "--license", out.parent / "LICENSE.txt", "--key", key, "--threads", 1, "--json"]
    done = run(tiny_gguf.folder, out, *words)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_it_is_an_artifact_with_what_an_app_needs(made: tuple[Path, dict[str, Any]], tiny_gguf: Artifact) -> None:
    folder, told = made
    manifest = load_artifact(folder).manifest  # its own sums hold too
    assert manifest.model_copy(update={"parity": None}) == tiny_gguf.manifest
    assert (folder / "LICENSE").read_text() == "Do as you like.\n"
    assert "# tiny" in (folder / "MODEL_CARD.md").read_text()
    assert set(told["files"]) == {*tiny_gguf.manifest.files, "manifest.json", "LICENSE", "MODEL_CARD.md"}
    assert check_folder(folder, told["public_key"])["files"] == told["files"] and told["exceeded"] == []


def test_golden_answers_are_the_sessions(made: tuple[Path, dict[str, Any]], tiny_gguf: Artifact) -> None:
    parity = load_artifact(made[0]).manifest.parity
    assert parity is not None and parity.kl_mean is None
    session, contract = targets.open_artifact(tiny_gguf, threads=1), tiny_gguf.manifest.contract
    *texts, chat = parity.golden
    for answer in texts:
        assert answer.text and answer.prompt_ids == text_ids(session, contract, answer.text)
        assert answer.messages is None and answer.tokens == []
    rendered = render_chat(contract.chat_template or "", chat.messages or [], contract.special_tokens)
    assert chat.text == rendered and chat.prompt_ids == chat_ids(session, contract, rendered)
    assert chat.tokens == list(session.generate(chat.prompt_ids, 16))[: len(chat.tokens)]
    assert len(texts) == 5
    session.close()


def test_answers_of_verification_stay_and_those_of_texts_come_once(tiny_gguf: Artifact, tmp_path: Path) -> None:
    (tmp_path / "L").write_text("x")
    recorded, old = GoldenAnswer(prompt_ids=[1], tokens=[2]), GoldenAnswer(prompt_ids=[3], tokens=[], text="old")
    parity = Parity(windows=3, window_tokens=8, unusable_positions=0, kl_mean=0.25, golden=[recorded, old])
    verified = Artifact(tiny_gguf.folder, tiny_gguf.manifest.model_copy(update={"parity": parity}))
    new = GoldenAnswer(prompt_ids=[4], tokens=[5], text="new")
    write_bundle(verified, tmp_path / "out", "web", license_file=tmp_path / "L", golden=[new])
    kept = load_artifact(tmp_path / "out").manifest.parity
    assert kept == parity.model_copy(update={"golden": [recorded, new]})


def test_a_signature_is_one_that_openssl_verifies(made: tuple[Path, dict[str, Any]], key: Path, tmp_path: Path) -> None:
    if not (openssl := shutil.which("openssl")):
        pytest.skip("openssl is not installed")
    (tmp_path / "sig").write_bytes(base64.b64decode((made[0] / SIGNATURE).read_text()))
    words = ["-inkey", key, "-rawin", "-in", made[0] / SUMS, "-sigfile", tmp_path / "sig"]
    done = subprocess.run([openssl, "pkeyutl", "-verify", *map(str, words)], capture_output=True, text=True)
    assert "Verified Successfully" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["model.gguf", "manifest.json", "LICENSE", SUMS, SIGNATURE, "more.txt"])
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_every_change_is_seen(made: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, how: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made[0], folder)
    if how == "removed" and name == "more.txt":
        (folder / "manifest.json").unlink()
    elif how == "removed":
        (folder / name).unlink()
    else:
        data = (folder / name).read_bytes() if (folder / name).exists() else b"x"
        (folder / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BadArtifact):
        check_folder(folder, made[1]["public_key"])


def test_another_key_is_not_that_one(made: tuple[Path, dict[str, Any]]) -> None:
    for other in (base64.b64encode(bytes(32)).decode(), "not base64", ""):
        with pytest.raises(BadArtifact, match="no signature of that key"):
            check_folder(made[0], other)


def test_a_zip_is_the_same_and_the_same_again(tiny_gguf: Artifact, tmp_path: Path) -> None:
    (tmp_path / "L").write_text("x")
    for name in ("a.zip", "b.zip"):
        assert run(tiny_gguf.folder, tmp_path / name, "--for", "web", "--license", tmp_path / "L").returncode == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    zipfile.ZipFile(tmp_path / "a.zip").extractall(tmp_path / "out")
    check_folder(tmp_path / "out")
    assert not (tmp_path / "out" / SIGNATURE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["L", "a.zip", "b.zip", "out"]


def test_what_is_refused(tiny_gguf: Artifact, tmp_path: Path) -> None:
    (tmp_path / "L").write_text("x")
    (tmp_path / "key").write_text("no key")
    licensed = ["--for", "ios", "--license", tmp_path / "L"]
    for words, said in (
        (["--for", "ios"], "no licence of the model"),
        (["--for", "ios", "--license", tmp_path / "none"], "no licence of the model"),
        ([*licensed, "--key", tmp_path / "key"], "no private key in PEM"),
        ([*licensed, "--key", tmp_path / "none"], "--key"),
    ):
        done = run(tiny_gguf.folder, tmp_path / "out", *words)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()
    other = Artifact(tiny_gguf.folder, tiny_gguf.manifest.model_copy(update={"target": "onnx"}))
    with pytest.raises(BadArtifact, match="an app for android opens gguf, executorch, not onnx"):
        check_bundle(other, "android", tmp_path / "L")
    with pytest.raises(EdgekdError):
        check_bundle(tiny_gguf, "web", None)


def test_a_new_name_in_somebody_elses_folder(
    tiny_gguf: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as /tmp, where everybody may write."""
    (tmp_path / "L").write_text("x")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    words = [tiny_gguf.folder, tmp_path / "out", "--for", "ios", "--license", tmp_path / "L", "--threads", "1"]
    done = CliRunner().invoke(app, ["bundle", *map(str, words)])
    assert done.exit_code == 0, done.exception
    check_folder(tmp_path / "out")


def test_limits_have_their_sources() -> None:
    assert all(limit.source.startswith("https://") for limits in LIMITS.values() for limit in limits)
    assert exceeded("android", [10**8]) == [] and len(exceeded("android", [10**9])) == 1
    assert len(exceeded("android", [3 * 10**9, 2 * 10**9])) == 3
    assert "512 MB" in exceeded("ios", [600_000_000])[0] and exceeded("web", [2 * 10**9] * 3) == []
    assert "wllama" in exceeded("web", [3 * 10**9])[0]

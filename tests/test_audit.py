"""The audit against children that do what an artifact must not, and on machines that lack its tools."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgekd.audit import Watch, audit, find_tools, watch
from edgekd.errors import EdgekdError
from edgekd.manifest import Artifact, Contract, write_artifact
from edgekd.proof import Audit

TOOLS = find_tools()
BLIND = [text for text in TOOLS.not_checked if "strace" in text]
pytestmark = pytest.mark.skipif(bool(BLIND), reason=" ".join(BLIND))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A folder beside others, with a file that its manifest does not name."""
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "model.bin").write_bytes(b"weights")
    contract = Contract(context_length=8, vocab_size=4, bos_id=None, eos_ids=[0], add_bos=False, chat_template=None)
    made = write_artifact(
        folder,
        name="n",
        target="t",
        recipe="r",
        runtime="x",
        main_file="sub/model.bin",
        student_digest="d",
        parameters=7,
        bits_per_weight=8.0,
        contract=contract,
        versions={},
    )
    (folder / "unlisted.txt").write_text("x")
    (tmp_path / "sibling.txt").write_text("x")
    (folder / "sub" / "way out").symlink_to(tmp_path / "sibling.txt")
    return made


def does(code: str, artifact: Artifact, tools: Watch = TOOLS) -> Audit:
    """What the audit says of a child that reads the artifact and then does this in ``place``, the folder above it."""
    begin = (
        f"import os, socket; place = {str(artifact.folder.parent)!r}; open(place + '/artifact/sub/model.bin').read()\n"
    )
    return watch([sys.executable, "-I", "-c", begin + code], artifact, tools)


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import tempfile; tempfile.TemporaryFile().write(b'x')",
        "os.mkdir(os.environ['TMPDIR'] + '/a'); os.rename(os.environ['TMPDIR'] + '/a', os.environ['TMPDIR'] + '/b')",
        "os.listdir(place + '/artifact'); open(place + '/artifact/manifest.json').read()",
        "open(os.devnull, 'w').write('x'); socket.socketpair()",
        "import hashlib, subprocess; subprocess.run(['/bin/true'])",
        "os.path.exists(place + '/sibling.txt'); os.path.exists('/root/.netrc')",
    ],
)
def test_an_honest_child_passes(code: str, artifact: Artifact) -> None:
    seen = does(code, artifact)
    assert seen.failures == [] and seen.opened["artifact"] >= 1
    assert seen.status == ("not checked" if TOOLS.not_checked else "passed")


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("socket.socket(socket.AF_INET)", "socket: AF_INET SOCK_STREAM"),
        ("socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)", "socket: AF_INET6 SOCK_DGRAM"),
        (
            "try: socket.create_connection(('192.0.2.1', 443), timeout=0.2)\nexcept OSError: pass",
            "socket: connect AF_INET 192.0.2.1:443",
        ),
        ("socket.socket(socket.AF_UNIX).connect_ex(place + '/x')", "socket: connect AF_UNIX {place}/x"),
        ("import threading; threading.Thread(target=socket.socket).start()", "socket: AF_INET SOCK_STREAM"),
        (
            "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; socket.socket()'], env={})",
            "socket: AF_INET SOCK_STREAM",
        ),
        ("os.makedirs(os.path.expanduser('~/.cache/Microsoft'))", "write: ~/.cache/Microsoft"),
        ("open(os.path.expanduser('~/x'), 'w')", "write: ~/x"),
        ("open(place + '/artifact/cache.bin', 'w')", "write: {place}/artifact/cache.bin"),
        ("open(place + '/artifact/sub/model.bin', 'r+')", "write: {place}/artifact/sub/model.bin"),
        ("open('here.ses', 'w')", "write: ./here.ses"),
        ("os.chmod(place + '/sibling.txt', 0o600)", "write: {place}/sibling.txt"),
        ("os.unlink(place + '/sibling.txt')", "write: {place}/sibling.txt"),
        ("os.chdir(place); os.mkdir('made')", "write: {place}/made"),
        (
            "os.symlink(place, os.environ['TMPDIR'] + '/l'); os.mkdir(os.environ['TMPDIR'] + '/l/made')",
            "write: {place}/made",
        ),
        ("open(place + '/sibling.txt')", "read: {place}/sibling.txt"),
        ("open(place + '/artifact/sub/way out')", "read: {place}/sibling.txt"),
        ("open(place + '/artifact/unlisted.txt')", "read: {place}/artifact/unlisted.txt"),
        ("os.link(place + '/sibling.txt', os.environ['TMPDIR'] + '/l')", "read: {place}/sibling.txt"),
        ("os.listdir(place)", "read: {place}"),
        ("import subprocess; subprocess.run(['/bin/cat', place + '/sibling.txt'])", "read: {place}/sibling.txt"),
        ("open('/etc/hosts')", "read: /etc/hosts"),
        ("raise SystemExit(3)", "run: ended with exit code 3: without a word"),
        ("1 / 0", "run: ended with exit code 1: ZeroDivisionError: division by zero"),
    ],
)
def test_every_fault_fails_by_its_name(code: str, named: str, artifact: Artifact) -> None:
    seen = does(code, artifact)
    assert seen.status == "failed"
    assert named.format(place=artifact.folder.parent) in seen.failures


def test_the_child_has_nothing_that_quietens_a_library(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, "1")
    known = {"HOME", "TMPDIR", "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG", "PYTHONDONTWRITEBYTECODE", "LC_CTYPE"}
    assert does(f"assert set(os.environ) <= {known}, os.environ", artifact).failures == []


def test_what_a_user_can_mend_is_an_error_and_no_verdict(artifact: Artifact) -> None:
    with pytest.raises(EdgekdError, match="mend me"):
        does("import sys; sys.exit(print('mend me', file=sys.stderr) or 2)", artifact)
    with pytest.raises(EdgekdError, match="unknown target 't'"):
        audit(artifact)


def test_what_cannot_be_checked_is_said_and_does_not_pass(artifact: Artifact) -> None:
    blind = Watch(TOOLS.isolated, [], ["sockets, files read and files written: strace is not installed"])
    seen = does("open(place + '/sibling.txt')", artifact, blind)
    assert (seen.status, seen.failures, seen.opened) == ("not checked", [], {})
    assert does("1 / 0", artifact, blind).status == ("failed" if TOOLS.isolated else "not checked")
    open_network = Watch([], TOOLS.traced, ["running without a network: unshare is not installed"])
    assert does("pass", artifact, open_network).status == "not checked"
    assert does("socket.socket()", artifact, open_network).status == "failed"
    assert does("1 / 0", artifact, Watch([], [], ["all of it: nothing is here"])).status == "not checked"


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_tools() == Watch(
        [],
        [],
        [
            "running without a network: unshare is not installed",
            "sockets, files read and files written: strace is not installed",
        ],
    )
    (tmp_path / "unshare").write_text("#!/bin/sh\necho unshare: not permitted >&2; exit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    assert find_tools().not_checked[0].endswith("unshare does not work here (unshare: not permitted)")

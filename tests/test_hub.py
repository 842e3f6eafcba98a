"""``hub:`` against a server that speaks the few endpoints of the Hub that are asked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from .test_privacy import run

pytest.importorskip("huggingface_hub")

NEWEST, OLDER = "a" * 40, "b" * 40
RESOLVE = """
import edgekd, huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 500  # what has come of a file is counted in these
from edgekd.errors import EdgekdError
from edgekd.student import resolve_model
try:
    print(resolve_model({reference!r}{more}))
except EdgekdError as error:
    print("error:", error)
"""


class Hub:
    """A Hub of one model.

    Args:
        files: by name, those of the newest revision.
        cut: how many bytes of the weights are sent before the connection breaks, once.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.older = files, files | {"config.json": b'{"old": true}'}
        self.asked: list[tuple[str, str | None]] = []
        self.cut: int | None = None
        self.gated = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, to: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = to.path.partition("?")[0]
        self.asked.append((path, to.headers.get("Range")))
        if self.gated:
            return self.send(to, 401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if path.startswith("/api/models/someone/model"):
            parts = path.split("/")
            revision = parts[6] if len(parts) > 6 else "main"
            commit = {"main": NEWEST, NEWEST: NEWEST, "v1": OLDER, OLDER: OLDER}.get(revision)
            if commit is None:
                return self.send(to, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if parts[5:6] == ["tree"]:
                entries = [{"type": "file", "path": n, "size": len(d), "oid": sha1(d)} for n, d in self.files.items()]
                return self.send(to, 200, json.dumps(entries).encode(), {})
            told = {"id": "someone/model", "sha": commit, "siblings": [{"rfilename": name} for name in self.files]}
            return self.send(to, 200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        if path.startswith("/someone/model/resolve/"):
            commit, _, name = path.removeprefix("/someone/model/resolve/").partition("/")
            data = (self.older if commit == OLDER else self.files).get(name)
            if data is not None:
                return self.file(to, commit, name, data, body)
        return self.send(to, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def file(self, to: BaseHTTPRequestHandler, commit: str, name: str, data: bytes, body: bool) -> None:
        start = int((to.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{sha1(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body and self.cut and name.endswith(".safetensors"):
            cut, self.cut = self.cut, None
            self.send(to, 200, data, headers, sent=cut)
            to.close_connection = True
            return
        self.send(to, 206 if start else 200, data[start:], headers, sent=None if body else 0)

    @staticmethod
    def send(
        to: BaseHTTPRequestHandler, code: int, data: bytes, headers: dict[str, str], sent: int | None = None
    ) -> None:
        to.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            to.send_header(name, value)
        to.end_headers()
        if to.command != "HEAD":
            to.wfile.write(data[:sent])
            to.wfile.flush()


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def files(tiny_teacher):
    model = {path.name: path.read_bytes() for path in tiny_teacher.iterdir() if path.is_file()}
    extra = {"chat_template.jinja": b"{{ messages }}", "merges.txt": b"#version: 0.2\n", "tokenizer.model": b"spm"}
    return model | extra | {"pytorch_model.bin": b"pickle", "README.md": b"# A model", "model.py": b"import os"}


@pytest.fixture
def hub(files):
    hub = Hub(dict(files))
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def resolve(hub, home, reference="hub:someone/model", more=""):
    return run(RESOLVE.format(reference=reference, more=more), home, HF_ENDPOINT=hub.address).strip()


def test_a_model_comes_whole_and_nothing_that_runs(hub, files, tmp_path):
    folder = Path(resolve(hub, tmp_path))
    wanted = {*files} - {"pytorch_model.bin", "README.md", "model.py"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / name).read_bytes() == files[name] for name in wanted)
    hub.asked.clear()
    assert Path(resolve(hub, tmp_path)) == folder
    assert not any("/resolve/" in path and path.endswith(".safetensors") for path, _ in hub.asked)


def test_what_reads_the_configuration_alone_downloads_nothing_else(hub, files, tmp_path):
    folder = Path(resolve(hub, tmp_path, more=", files=['config.json']"))
    assert {path.name for path in folder.iterdir()} == {"config.json"}
    resolve(hub, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_revision_is_pinned(hub, tmp_path):
    newest, older = Path(resolve(hub, tmp_path)), Path(resolve(hub, tmp_path, "hub:someone/model@v1"))
    assert (newest.name, older.name) == (NEWEST, OLDER)
    assert json.loads((older / "config.json").read_text()) == {"old": True}
    said = resolve(hub, tmp_path, "hub:someone/model@v9")
    assert said.startswith("error: hub:someone/model@v9: it has no revision v9.")


def test_a_broken_download_goes_on_where_it_was(hub, files, tmp_path):
    hub.cut = 1000
    folder = Path(resolve(hub, tmp_path))
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert "bytes=1000-" in {given for path, given in hub.asked if path.endswith("model.safetensors")}


def test_what_is_withheld_or_missing_is_one_sentence(hub, tmp_path):
    said = resolve(hub, tmp_path, "hub:someone/nothing")
    assert said.startswith("error: hub:someone/nothing: the Hub has no such model, or does not show it to you.")
    hub.gated = True
    said = resolve(hub, tmp_path)
    assert said.startswith("error: hub:someone/model: its owners ask you to accept their terms first.")
    assert "hf auth login" in said and "\n" not in said


def test_a_model_of_the_hub_is_deployed(hub, tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "text.txt").write_text("\n\n".join(f"def f{i}(x):\n    return x * {i}" for i in range(2000)))
    code = (
        "import sys; from edgekd.cli import main; "
        "sys.argv = 'edgekd deploy hub:someone/model@v1 --targets gguf --recipe fp16 --text text.txt'.split(); main()"
    )
    del hub.files["chat_template.jinja"], hub.files["tokenizer.model"], hub.files["merges.txt"]
    hub.older = hub.files
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_ENDPOINT": hub.address},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "runs/model/artifacts/gguf-fp16" in done.stdout and "gate passed" in done.stdout

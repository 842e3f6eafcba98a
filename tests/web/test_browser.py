"""web-demo/ in headless Chromium, driven as a user does, against the Session of the same artifact."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from demos import IDS, QUESTION, ROOT, make_artifact, make_bundle, tool
from edgekd import targets
from edgekd.bundle import SUMS
from edgekd.conversation import chat_ids, render_chat
from edgekd.files import digest
from edgekd.manifest import MANIFEST, Artifact, load_artifact
from edgekd.proof import Benchmark
from scripted import spoken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HERE, DEMO = Path(__file__).parent, ROOT / "web-demo"
GET = "make test-web"


@pytest.fixture(scope="module")
def node() -> str:
    found = tool("node", get="apt install nodejs npm")
    for needed in ("node_modules/playwright-core", "node_modules/@huggingface/transformers", "vendor/wllama.js"):
        if not (DEMO / needed).exists():
            pytest.skip(f"web-demo/{needed} is missing: {GET}")
    return found


@pytest.fixture(scope="module")
def chromium() -> str:
    return tool("chromium", "chromium-browser", "google-chrome", get="apt install chromium")


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(request.param, tmp_path_factory.mktemp("artifact") / request.param)


def demo_handler() -> type:
    """The request handler of the demo's own server."""
    spec = importlib.util.spec_from_file_location("serve", DEMO / "serve.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Handler


@pytest.fixture
def serve() -> Iterator[Any]:
    """Starts a server on a free port of localhost; its address."""
    servers = []

    def start(handler: Any) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def drive(node: str, chromium: str, url: str, script: str = "drive.mjs", **job: Any) -> dict[str, Any]:
    """What the page said and did."""
    playwright = DEMO / "node_modules/playwright-core"
    command = [node, str(HERE / script), chromium, str(playwright), url, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_golden_vectors(node: str) -> None:
    done = subprocess.run([node, "--test", str(HERE / "vectors.test.mjs")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_page_says_what_the_session_says(node: str, chromium: str, serve: Any, artifact: Artifact) -> None:
    url = serve(partial(demo_handler(), directory=str(DEMO)))
    settings = {"prompt_tokens": [16, 64], "decode_tokens": 16, "runs": 2}
    found = drive(node, chromium, url, folder=str(artifact.folder), ids=IDS, count=24, chat=QUESTION, settings=settings)
    session, contract = targets.open_artifact(artifact, threads=1), artifact.manifest.contract
    chat = render_chat(contract.chat_template or "", [{"role": "user", "content": QUESTION}], contract.special_tokens)
    prompt = chat_ids(session, contract, chat)
    answer = spoken(session, session.generate(prompt, 40))
    tokens = list(session.generate(IDS, 24))
    session.close()

    assert found["isolated"] and "golden tokens the same" in found["loaded"], found["loaded"]
    used = found["used"]
    assert used["tokens"] == tokens and len(tokens) == 24
    assert used["prompt"] == prompt
    assert used["test"]["failure"] is None and used["test"]["tokens"] > 20
    assert found["answer"].startswith(answer) and answer
    assert not found["escaped"], "the page reached another host"
    assert all(request.removeprefix("blob:").startswith(url) for request in found["requests"]), found["requests"]
    assert all("example.org" in error for error in found["errors"]), found["errors"]

    record = used["bench"]
    assert record["files_digest"] == digest(artifact.manifest.files)
    assert record["size_bytes"] == artifact.size_bytes
    benchmark = Benchmark.model_validate_json(json.dumps(record["benchmark"]))
    assert benchmark.settings.prompt_tokens == [16, 64] and benchmark.settings.runs == 2
    for figure in (benchmark.load_s, benchmark.decode_tokens_per_s, *benchmark.ttft_s.values()):
        assert figure.value and figure.value > 0 and len(figure.samples) == 2
    assert benchmark.peak_rss_bytes.value is None and benchmark.peak_rss_bytes.reason


@pytest.mark.parametrize("artifact", ["gguf"], indirect=True)
def test_a_server_without_the_headers_leaves_one_thread(
    node: str, chromium: str, serve: Any, artifact: Artifact
) -> None:
    plain = type("Plain", (demo_handler(),), {"isolated": False})
    url = serve(partial(plain, directory=str(DEMO)))
    found = drive(node, chromium, url, folder=str(artifact.folder), ids=IDS, count=4)
    assert not found["isolated"] and found["used"]["threads"] == 1
    assert "not cross-origin isolated: one thread" in found["loaded"]


def damage(artifact: Artifact, folder: Path, kind: str) -> Path:
    """A copy of an artifact with one fault."""
    shutil.copytree(artifact.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    if kind == "file_changed":
        data = bytearray((folder / "model.gguf").read_bytes())
        data[-1] ^= 1
        (folder / "model.gguf").write_bytes(data)
    elif kind == "file_missing":
        (folder / "model.gguf").unlink()
    elif kind == "newer_schema":
        manifest["schema_version"] = 2
    elif kind == "other_target":
        manifest["target"] = "executorch"
    elif kind == "self_test":
        manifest["parity"]["golden"][0]["tokens"][0] ^= 1
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return folder


@pytest.mark.parametrize("artifact", ["gguf"], indirect=True)
def test_what_is_wrong_is_told_in_a_sentence(
    node: str, chromium: str, serve: Any, artifact: Artifact, tmp_path: Path
) -> None:
    url = serve(partial(demo_handler(), directory=str(DEMO)))
    for kind in ("file_changed", "file_missing", "newer_schema", "other_target", "self_test"):
        found = drive(node, chromium, url, folder=str(damage(artifact, tmp_path / kind, kind)))
        assert found["used"]["code"] == kind
        assert found["used"]["refused"] == found["loaded"], "the page says what the code refuses"
    found = drive(node, chromium, url, folder=str(artifact.folder), options={"most": 2**20})
    assert found["used"]["code"] == "memory" and "there are 1 MiB" in found["used"]["refused"]


def test_with_a_key_only_what_it_signed_is_opened(
    node: str, chromium: str, serve: Any, artifact: Artifact, tmp_path: Path
) -> None:
    url, bundle = serve(partial(demo_handler(), directory=str(DEMO))), tmp_path / "bundle"
    key = make_bundle(artifact, bundle, "web")
    found = drive(node, chromium, url, folder=str(bundle), key=key)
    assert found["used"]["test"]["failure"] is None and found["used"]["test"]["answers"] == 4 + 6, found["loaded"]
    assert drive(node, chromium, url, folder=str(artifact.folder), key=key)["used"]["code"] == "not_signed"
    data = bytearray((bundle / SUMS).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / SUMS).write_bytes(data)
    found = drive(node, chromium, url, folder=str(bundle), key=key)
    assert found["used"]["code"] == "bad_signature" and found["loaded"] == found["used"]["refused"]


def test_transformers_js_loads_the_onnx_folder_as_it_is(node: str, chromium: str, serve: Any, tmp_path: Path) -> None:
    artifact = make_artifact("onnx", tmp_path / "onnx")
    places = {"/artifact/": artifact.folder, "/node_modules/": DEMO / "node_modules", "/": HERE}

    class Handler(demo_handler()):
        def translate_path(self, path: str) -> str:
            start = next(start for start in places if path.startswith(start))
            return str(places[start] / path.removeprefix(start))

    found = drive(node, chromium, serve(Handler), "drive_transformers.mjs", ids=IDS, count=16)
    session = targets.open_artifact(load_artifact(artifact.folder), threads=1)
    assert found["tokens"] == list(session.generate(IDS, 16))
    assert found["ids"] == session.tokenize("Hello, world")
    session.close()

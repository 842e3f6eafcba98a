"""What edgekd sets for every library, and when the Hub may be asked: counted by a server that stands in for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

SILENT = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_XET_TELEMETRY_ENABLED": "0",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
}
SHOW = f"import json, os; print(json.dumps({{name: os.environ.get(name) for name in {list(SILENT)}}}))"
RESOLVE = """
from pathlib import Path
from edgekd.errors import EdgekdError
from edgekd.student import resolve_model
try:
    print(resolve_model("hub:someone/model"))
except EdgekdError as error:
    print(error)
"""
ROWS = """
from pathlib import Path
from edgekd.distill.data import _rows
from edgekd.errors import EdgekdError
from edgekd.spec import DataSpec
try:
    print(next(_rows(DataSpec(source="hub", name="someone/data", column="text"), Path())))
except EdgekdError as error:
    print(error)
"""


def run(code: str, home: Path, *flags: str, **environment: str) -> str:
    """Output of a child that has this environment alone."""
    known = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    known |= {"HOME": str(home), **environment}
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Address of a Hub that has nothing, and the paths that were asked of it."""
    asked: list[str] = []

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("flags", [(), ("-I",), ("-I", "-S")])
@pytest.mark.parametrize("given", [{}, {"ORT_DISABLE_TELEMETRY": "0", "HF_HUB_OFFLINE": "0", "DO_NOT_TRACK": ""}])
def test_the_import_silences_this_process_and_its_children(flags: tuple[str, ...], given: dict, tmp_path: Path) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-c', {SHOW!r}], check=True)"
    path = f"import sys; sys.path[:0] = {[str(Path(__file__).parents[1])]}; " if "-S" in flags else ""
    assert json.loads(run(f"{path}import edgekd; {child}", tmp_path, *flags, **given)) == SILENT


def test_libraries_imported_before_are_silenced_too(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = """
import datasets, huggingface_hub
before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
import edgekd
print(before, huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE,
      huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS)
"""
    assert run(code, tmp_path).split() == ["(False,", "False)", "True", "True", "True", "False"]


@pytest.mark.parametrize(("code", "path"), [(RESOLVE, "/api/models/someone/model"), (ROWS, "/someone/data")])
def test_the_hub_is_asked_for_what_was_named_and_nothing_else(code: str, path: str, hub, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    address, asked = hub
    run(code, tmp_path, HF_ENDPOINT=address)
    assert asked and all(path in line for line in asked), asked


@pytest.mark.parametrize("code", [RESOLVE, ROWS])
def test_a_user_who_is_offline_stays_so(code: str, hub, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    address, asked = hub
    said = run(code, tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert "someone/" in said and not asked


def test_after_a_hub_model_the_network_is_away_again(hub, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    address, _ = hub
    code = (
        RESOLVE
        + "import huggingface_hub, os\nprint(huggingface_hub.is_offline_mode(), os.environ['HF_HUB_OFFLINE'])\n"
        + "import datasets\nprint(datasets.config.HF_HUB_OFFLINE)\n"
    )
    assert run(code, tmp_path, HF_ENDPOINT=address).splitlines()[1:] == ["True 1", "True"]


def test_a_child_of_ours_may_still_be_asked_for_a_hub_model(hub, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    address, asked = hub
    code = f"import edgekd, subprocess, sys; subprocess.run([sys.executable, '-c', {RESOLVE!r}], check=True)"
    run(code, tmp_path, HF_ENDPOINT=address)
    assert asked


def test_reading_a_local_table_leaves_nothing_at_home(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    home = tmp_path / "home"
    home.mkdir()
    parquet.write_table(arrow.table({"text": ["one", "two"]}), tmp_path / "rows.parquet")
    code = ROWS.replace('source="hub", name="someone/data"', 'source="parquet", paths=["rows.parquet"]')
    code = code.replace("Path())", f"Path({str(tmp_path)!r}))")
    assert "one" in run(code, home)
    assert list(home.rglob("*")) == []


def test_waiting_threads_spin_for_microseconds_unless_the_user_wants_another_thing(tmp_path):
    script = "import edgekd, os; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    for given, said in ((None, "PASSIVE 1000"), ("ACTIVE", "ACTIVE None"), ("PASSIVE", "PASSIVE None")):
        environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        environment |= {"OMP_WAIT_POLICY": given} if given else {}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == said

"""The server: a socket, a thread that answers, and an end that leaves nothing behind."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EdgekdError, MissingExtra
from ..generation import Generator
from ..manifest import Artifact, load_artifact
from ..session import Session
from ..targets import label, open_artifact

if TYPE_CHECKING:
    import uvicorn

    from .app import Served

LOOPBACK = ("127.0.0.1", "::1", "localhost")
OnReady = Callable[[str, str], None]
_GRACE_SECONDS = 2
"""That answers in flight have when the server stops: each is told so, and ends."""


def check_access(host: str, key: str | None) -> None:
    """Refuse to let other machines in without a key.

    Raises:
        EdgekdError: says so.
    """
    if key is not None and (len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key):
        raise EdgekdError("the key is not 16 or more printable ASCII characters.", "Make one: openssl rand -hex 24")
    if host not in LOOPBACK and key is None:
        raise EdgekdError(
            f"--host {host:.200} lets other machines in, and there is no key.",
            "Put one in a file and name it with --key-file.",
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        EdgekdError: the name or the port cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise EdgekdError(f"{host}:{port}: {error.strerror or error}.", "Choose another --host or --port.") from error
    except OverflowError as error:
        raise EdgekdError(f"--port {port}: not from 0 to 65535.") from error
    taken.set_inheritable(False)
    return taken


def serve(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    key: str | None = None,
    threads: int | None = None,
    on_ready: OnReady = lambda url, model: None,
) -> None:
    """Serve an artifact until the process is asked to stop.

    Args:
        port: 0 takes a free one.
        key: what clients must bear; needed where other machines can ask.
        on_ready: told the address and the model's name once requests are answered.

    Raises:
        EdgekdError: and its children: no valid artifact, no free port, a missing package.
    """
    try:  # before the model is opened, which takes a while
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra((error.name or "").replace("_", "-"), "serve") from error
    check_access(host, key)
    artifact = load_artifact(folder)
    with listen(host, port) as taken:
        session = open_artifact(artifact, threads=threads)
        try:
            _run(served_from(artifact, session), key, taken, on_ready)
        finally:
            session.close()


def served_from(artifact: Artifact, session: Session) -> Served:
    """A session at work, under the artifact's name."""
    from .app import Served
    from .grammar import Grammars
    from .worker import Worker

    manifest = artifact.manifest
    return Served(
        session,
        manifest.contract,
        model=f"{manifest.name}-{label(manifest.target, manifest.recipe)}",
        fingerprint=f"fp_{manifest.files[manifest.main_file][:12]}",
        worker=Worker(Generator(session, manifest.contract.eos_ids)),
        grammars=Grammars(session, manifest.contract),
        created=int(time.time()),
    )


def _run(served: Served, key: str | None, taken: socket.socket, on_ready: OnReady) -> None:
    try:
        with suppress(KeyboardInterrupt):  # as it is asked to stop
            make_server(served, key, taken, on_ready).run(sockets=[taken])
    finally:
        served.worker.close()


def make_server(served: Served, key: str | None, taken: socket.socket, on_ready: OnReady) -> uvicorn.Server:
    """The server of what is served, which begins when it is run with the socket."""
    import uvicorn

    from .app import application

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = taken.getsockname()[:2]
            on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", served.model)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            served.worker.stop()
            await super().shutdown(sockets)

    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return Server(
        uvicorn.Config(
            application(served, key),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )

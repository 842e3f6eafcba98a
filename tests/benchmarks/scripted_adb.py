"""An adb server on the loopback with one phone behind it, whose shell is this machine's ``sh`` in a folder of its own.

It speaks the protocol between ``adb`` and its server: host services, ``shell,v2`` with its packets, and ``sync`` with
STAT and SEND. What lies on the phone under ``/data/local/tmp`` and some folders of ``/sys`` lies here under ``root``.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import socketserver
import struct
import subprocess
import threading
from pathlib import Path

SERIAL = "R5CT10"
_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = range(5)


class Phone:
    """The server; ``environment`` has the client find it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.attached = {SERIAL: "device"}
        self.damage = False
        """Files arrive with another last byte."""
        self.connections: list[socket.socket] = []
        self.cut_at: str | None = None
        """A word in a shell command at which the cable is pulled."""
        for folder in ("tmp", "bin", "power_supply", "thermal/thermal_zone0"):
            (root / folder).mkdir(parents=True)
        (root / "thermal/thermal_zone0/temp").write_text("41500\n")
        self.program(
            "getprop", 'case $1 in *manufacturer) echo Acme;; *.model) echo "Anvil 7";; *release) echo 16;; esac'
        )
        self.program("dumpsys", "echo '  USB powered: false'; echo '  temperature: 312'")
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"ADB_SERVER_SOCKET": f"tcp:localhost:{self._server.server_address[1]}"}

    def program(self, name: str, body: str) -> None:
        """Put a command on the phone."""
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def here(self, text: str) -> str:
        """A text of the phone with this machine's folders."""
        for there, ours in {
            "/data/local/tmp": "tmp",
            "/sys/class/power_supply": "power_supply",
            "/sys/class/thermal": "thermal",
        }.items():
            text = text.replace(there, str(self.root / ours))
        return text

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(phone: Phone) -> type[socketserver.BaseRequestHandler]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError, EOFError):
                _serve(phone, self.request)

    return Handler


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (piece := connection.recv(size - len(data))):
            raise EOFError
        data += piece
    return data


def _framed(text: str) -> bytes:
    return f"{len(text.encode()):04x}".encode() + text.encode()


def _serve(phone: Phone, connection: socket.socket) -> None:
    def request() -> str:
        return _exactly(connection, int(_exactly(connection, 4), 16)).decode()

    asked = request()
    if asked == "host:version":
        connection.sendall(b"OKAY" + _framed("0029"))
    elif asked == "host:devices":
        connection.sendall(b"OKAY" + _framed("".join(f"{s}\t{state}\n" for s, state in phone.attached.items())))
    elif asked == f"host-serial:{SERIAL}:features":
        connection.sendall(b"OKAY" + _framed("shell_v2,cmd"))
    elif asked in (f"host:transport:{SERIAL}", f"host:tport:serial:{SERIAL}") and SERIAL in phone.attached:
        connection.sendall(b"OKAY" + (struct.pack("<Q", 1) if "tport" in asked else b""))
        service = request()
        if service == "sync:":
            connection.sendall(b"OKAY")
            _sync(phone, connection)
        else:
            kind, _, command = service.partition(":")
            assert kind.startswith("shell,v2"), service
            connection.sendall(b"OKAY")
            _shell(phone, connection, command)
    else:
        connection.sendall(b"FAIL" + _framed(f"device '{SERIAL}' not found"))


def _sync(phone: Phone, connection: socket.socket) -> None:
    while True:
        kind, size = struct.unpack("<4sI", _exactly(connection, 8))
        if kind == b"STAT":
            path = Path(phone.here(_exactly(connection, size).decode()))
            stat = path.stat() if path.exists() else None
            numbers = (stat.st_mode, stat.st_size, int(stat.st_mtime)) if stat else (0, 0, 0)
            connection.sendall(struct.pack("<4sIII", b"STAT", *numbers))
        elif kind == b"SEND":
            name = _exactly(connection, size).decode().rpartition(",")[0]
            data = b""
            while (part := struct.unpack("<4sI", _exactly(connection, 8)))[0] == b"DATA":
                data += _exactly(connection, part[1])
            Path(phone.here(name)).write_bytes(data[:-1] + b"?" if phone.damage else data)
            connection.sendall(struct.pack("<4sI", b"OKAY", 0))
        else:
            return


def _shell(phone: Phone, connection: socket.socket, command: str) -> None:
    process = subprocess.Popen(
        ["sh", "-c", phone.here(command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": f"{phone.root / 'bin'}:/usr/bin:/bin"},
    )
    assert process.stdin and process.stdout and process.stderr
    phone.connections.append(connection)
    lock = threading.Lock()

    def relay(pipe, kind: int) -> None:
        while data := pipe.read1(65536):
            with lock:
                connection.sendall(struct.pack("<BI", kind, len(data)) + data)

    def listen() -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            while True:
                kind, size = struct.unpack("<BI", _exactly(connection, 5))
                data = _exactly(connection, size)
                if kind == _STDIN:
                    process.stdin.write(data)
                    process.stdin.flush()
                elif kind == _CLOSE_STDIN:
                    process.stdin.close()
        if not process.stdin.closed:
            process.stdin.close()  # as adbd does when its peer has gone
            process.send_signal(signal.SIGHUP)

    threading.Thread(target=listen, daemon=True).start()
    if phone.cut_at and phone.cut_at in command:
        threading.Event().wait(1)
        phone.attached.clear()
        for one in phone.connections:  # all of them go through the cable
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        process.wait(timeout=20)
        return
    pipes = [
        threading.Thread(target=relay, args=pair, daemon=True)
        for pair in ((process.stdout, _STDOUT), (process.stderr, _STDERR))
    ]
    for pipe in pipes:
        pipe.start()
    for pipe in pipes:
        pipe.join()
    connection.sendall(struct.pack("<BIB", _EXIT, 1, process.wait() & 255))

"""A real sshd on a port of the loopback, with keys of its own, and an ``ssh`` that knows it as ``board``."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


def why_not() -> str | None:
    """Why none can be started here."""
    if not SSHD or not shutil.which("ssh-keygen"):
        return "openssh-server is not installed"
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        return "sshd of root wants the folder /run/sshd"
    return None


class Board:
    """The server, and a folder with an ``ssh`` to be put before all others in ``PATH``."""

    def __init__(self, folder: Path, *, home: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name in ("host", "key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name],
                check=True,
                stdin=subprocess.DEVNULL,
            )
        self.port = _free_port()
        (folder / "authorized").write_text(f'environment="HOME={home}" {(folder / "key.pub").read_text()}')
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nPidFile none\n"
            f"AuthorizedKeysFile {folder / 'authorized'}\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nPermitUserEnvironment yes\n"
        )
        config = folder / "ssh_config"
        config.write_text(
            # Of several values ssh takes the first.
            f"Host stranger\n  UserKnownHostsFile {folder / 'nobody'}\n"
            f"Host board stranger\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"  IdentitiesOnly yes\n  IdentityFile {folder / 'key'}\n  UserKnownHostsFile {folder / 'known'}\n"
            f"Host closed\n  HostName 127.0.0.1\n  Port 1\n"
        )
        wrapper = self.bin / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
        wrapper.chmod(0o755)
        self._server = subprocess.Popen(
            [str(SSHD), "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL
        )
        _await_port(self.port)

    def stop(self) -> None:
        """End the server; connections that stand go on."""
        self._server.terminate()
        self._server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(port: int) -> None:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("sshd does not answer")

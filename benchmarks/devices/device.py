"""A machine that is not this one, through the user's own ``adb`` or ``ssh``: scripts are run there, files are sent.

No password is ever asked for, and no name reaches a shell unquoted. A script's end is told behind what it says, so that
a connection that broke is known from a script that failed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from ...errors import EdgekdError

_END = "edgekd ends with "
_LEAST_WAIT_S = 60
"""For a device to remove gigabytes."""
_ADB_REMEDY = "Install Android's platform-tools: apt-get install adb, or brew install android-platform-tools."


class Device(Protocol):
    """A machine that runs scripts of ``sh``."""

    name: str
    """As the user gave it, such as ``ssh:pi``."""
    home: str
    """Folder in which a temporary one can be made and programs run, as a word of ``sh``."""

    def command(self, script: str) -> list[str]:
        """The command of this machine that runs a script there."""
        ...

    def send(self, local: Path, remote: str) -> None:
        """Copy a file there.

        Raises:
            EdgekdError: it did not arrive.
        """
        ...


class Lost(EdgekdError):
    """The device is not there, or does not let us in."""


def connect(name: str) -> Device:
    """The device of a name: ``adb``, ``adb:SERIAL`` or ``ssh:HOST``.

    Raises:
        EdgekdError: no such kind, the program is missing, or the device does not answer.
    """
    kind, _, which = name.partition(":")
    if kind == "adb":
        return Adb(which)
    if kind == "ssh":
        return Ssh(which)
    raise EdgekdError(f"--device {name!r:.200}: no such kind of device.", "Give adb, adb:SERIAL or ssh:HOST.")


# --- scripts ----------------------------------------------------------------------------------------------------------


def ask(device: Device, script: str) -> str:
    """What a script says there.

    Raises:
        Lost: the connection broke, or there was none.
        EdgekdError: the script failed.
    """
    said, code, complaint = run(device, script)
    if code != 0:
        raise EdgekdError(f"{device.name}: {complaint or f'a command failed there with exit code {code}'}.")
    return said


def run(device: Device, script: str, on_line: Callable[[str], None] | None = None) -> tuple[str, int, str]:
    """What a script says there, its exit code, and the last line of its complaints.

    Our end of its input stays open until it has ended: a script that sees the end of it knows that we are gone.

    Raises:
        Lost: the connection broke, or there was none.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        process = _start(device.command(f"( {script}\n)\ncode=$?\necho\necho {_END}$code"), complaints)
        try:
            assert process.stdout
            lines = []
            for line in process.stdout:
                lines.append(line)
                if on_line:
                    on_line(line)
            process.wait()
        finally:
            process.kill()  # Ctrl-C: nothing of ours goes on
            process.communicate()
        complaint = _last_line(complaints)
    said, ended, code = "".join(lines).rpartition(f"\n{_END}")
    if not ended or not code.strip().isdigit():
        raise Lost(f"{device.name} is gone: {complaint or 'the connection broke'}.", "Connect it and try again.")
    return said, int(code), complaint


@contextmanager
def lease(device: Device) -> Iterator[str]:
    """A new folder there, which the device removes when the connection that asked for it ends, however it ends.

    Raises:
        EdgekdError: none can be made.
    """
    # adbd sends a hangup to what loses its connection.
    script = (
        f"trap '' HUP; umask 077; folder=$(mktemp -d {device.home}/.edgekd.XXXXXX) || exit; echo \"$folder\"; "
        'read -r _; rm -rf "$folder"'
    )
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        holder = _start(device.command(script), complaints)
        assert holder.stdout and holder.stdin
        try:
            folder = holder.stdout.readline().rstrip("\n")
            if not re.fullmatch(r"/.*/\.edgekd\.\w{6}", folder):
                holder.wait(_LEAST_WAIT_S)
                why = _last_line(complaints) or f"{folder!r:.200}"
                raise EdgekdError(f"{device.name}: no temporary folder could be made there: {why}.", "Free some space.")
            yield folder
        finally:
            holder.stdin.close()
            try:
                holder.wait(_LEAST_WAIT_S)
            except subprocess.TimeoutExpired:  # the device is gone: its end of the connection does it
                holder.kill()
                holder.wait()


def _start(command: Sequence[str], complaints: IO[str]) -> subprocess.Popen[str]:
    # A session of its own: Ctrl-C of the terminal is ours to answer, and then there is a folder to remove.
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    lines = [line.strip() for line in file if line.strip()]
    return lines[-1].rstrip(".") if lines else ""


def _program(name: str, remedy: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise EdgekdError(f"{name} is not installed.", remedy)
    return path


# --- adb --------------------------------------------------------------------------------------------------------------


class Adb:
    """An Android device, by USB or over the network.

    Args:
        serial: as ``adb devices`` has it; empty where one device alone is attached.

    Raises:
        EdgekdError: adb is missing, no device or several are attached, or the device has not allowed this computer.
    """

    home = "/data/local/tmp"

    def __init__(self, serial: str) -> None:
        self._adb = _program("adb", _ADB_REMEDY)
        if serial and not re.fullmatch(r"[A-Za-z0-9][\w.:-]*", serial, re.ASCII):
            raise EdgekdError(f"--device adb:{serial!r:.200} is no serial number.", "See: adb devices")
        self._serial = self._choose(serial)
        self.name = f"adb:{self._serial}"

    def command(self, script: str) -> list[str]:
        return [self._adb, "-s", self._serial, "shell", script]

    def send(self, local: Path, remote: str) -> None:
        command = [self._adb, "-s", self._serial, "push", str(local.resolve()), remote]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise Lost(f"{self.name}: {local.name} was not sent: {_last_of(done)}.", "Connect it and try again.")

    def _choose(self, serial: str) -> str:
        done = subprocess.run([self._adb, "devices"], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise Lost(f"adb does not work: {_last_of(done)}.", "Try: adb kill-server, then adb devices")
        attached = dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
        if not serial and len(attached) > 1:
            raise EdgekdError(
                f"adb: {len(attached)} devices are attached: {', '.join(attached)}.", "Name one: adb:SERIAL"
            )
        serial = serial or next(iter(attached), "")
        state = attached.get(serial)
        if state == "unauthorized":
            raise Lost(f"adb:{serial} has not allowed this computer.", "Unlock its screen and confirm the question.")
        if state is None:
            which = f"adb:{serial} is not attached" if serial else "adb: no device is attached"
            raise Lost(f"{which}.", "Turn on USB debugging, connect it, and see: adb devices")
        if state != "device":
            raise Lost(f"adb:{serial} is {state}.", "Disconnect it and connect it again.")
        return serial


def _last_of(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1].rstrip(".") if lines else f"exit code {done.returncode}"


# --- ssh --------------------------------------------------------------------------------------------------------------


class Ssh:
    """A board, by an ssh that asks for nothing: a key lets us in, and the host is known.

    Files go through the same connection into ``cat``, which every board has, and not every one an sftp server.

    Raises:
        EdgekdError: ssh is missing, the host's name is none, or it does not let us in.
    """

    home = '"$HOME"'
    """Not its ``/tmp``, which may be in memory, or where no program runs."""
    _OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=3")

    def __init__(self, host: str) -> None:
        self._ssh = _program("ssh", "Install OpenSSH's client: apt-get install openssh-client.")
        word = r"[A-Za-z0-9_:.\[][\w.:%\]-]*"  # what begins with - would be an option of ssh
        if not re.fullmatch(rf"({word}@)?{word}", host, re.ASCII):
            raise EdgekdError(f"--device ssh:{host!r:.200} is no host.", "Give ssh:HOST or ssh:USER@HOST.")
        self.name, self._host = f"ssh:{host}", host
        try:
            ask(self, ":")
        except Lost as lost:
            remedy = f"It must let you in without a question: ssh-copy-id {host}, then ssh {host}"
            raise Lost(f"{self.name}: {lost.cause.partition('gone: ')[2]}", remedy) from lost

    def command(self, script: str) -> list[str]:
        options = [word for option in self._OPTIONS for word in ("-o", option)]
        # The login shell there may be none of sh's kind; it only has to know single quotes.
        return [self._ssh, "-T", "-a", "-x", *options, "--", self._host, f"sh -c {shlex.quote(script)}"]

    def send(self, local: Path, remote: str) -> None:
        with local.open("rb") as file:
            command = self.command(f"cat >{shlex.quote(remote)}")
            done = subprocess.run(command, stdin=file, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise Lost(f"{self.name}: {local.name} was not sent: {_last_of(done)}.", "Free space there and try again.")

"""What the tests try in a process of its own; a module that this process can import."""

import os
import time
from pathlib import Path

from edgekd.errors import MissingExtra, Unsupported


def note(path: Path) -> None:
    with path.open("a") as file:
        file.write("x")


def dies(path: Path) -> None:
    os.abort()


def leaves(path: Path) -> None:
    os._exit(7)


def hangs(path: Path) -> None:
    time.sleep(60)


def takes_all_memory(path: Path) -> None:
    bytearray(2**40)


def fails(path: Path) -> None:
    raise ValueError("a reason\nof two lines")


def refuses(path: Path) -> None:
    print("noise", end="")
    raise Unsupported(f"{path.name}: ü.", "Do this.")


def lacks_a_package(path: Path) -> None:
    raise MissingExtra("some-package", "gguf")

"""Errors a user can mend: each says what is wrong, where, and what to do. The CLI prints them and exits with 2.

``as_error`` is the one place where every other exception arrives.
"""

from __future__ import annotations

import errno
import os

_TRAIN_PACKAGES = {
    *("torch", "transformers", "tokenizers", "huggingface_hub", "accelerate", "datasets", "tensorboard"),
    *("peft", "torchao"),
}


_FULL = (
    (errno.ENOSPC, "no space left on the disk.", "Free some"),
    (errno.EDQUOT, "your quota of the disk is used up.", "Free some"),
    (errno.EFBIG, "a file would grow larger than the file system or your limit (ulimit -f) allows.", "Raise the limit"),
)


class EdgekdError(Exception):
    """One clear sentence for the user, with an optional remedy.

    Args:
        cause: what is wrong and where (file and key).
        remedy: what to do about it.
    """

    exit_code = 2

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause = cause
        self.remedy = remedy
        super().__init__(f"{cause} {remedy}".strip())


class SpecError(EdgekdError):
    """The spec, or a file it names, is wrong."""


class MissingExtra(EdgekdError):
    """An optional runtime is not installed.

    Args:
        package: the distribution that is missing.
        extra: the extra of edgekd that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed.", f'Run: pip install "edgekd[{extra}]"')


class Unsupported(EdgekdError):
    """A target cannot hold this model; raised before anything is loaded."""


class NoGpu(EdgekdError):
    """A runtime has no GPU here."""


class DoesNotFit(EdgekdError):
    """The work needs more memory or disk than the machine has; raised before the work."""


class BadArtifact(EdgekdError):
    """A folder is not a valid artifact: no manifest, a changed file, a path that leaves the folder."""


class GateFailed(EdgekdError):
    """A measured figure missed its threshold: what, where, by how much."""

    exit_code = 1


class Agreed(EdgekdError):
    """Every process of a training raises it in the same place: the first tells it, and the others end after it."""


class Fault(EdgekdError):
    """An exception that nobody foresaw, in edgekd or a library it calls: the user cannot mend it, but report it."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h


def as_error(error: BaseException) -> EdgekdError:
    """What a user is told of any exception: itself where it is ours, the system's reason where the machine refused,
    and a ``Fault`` for everything else."""
    if isinstance(error, EdgekdError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name in _TRAIN_PACKAGES:
        return MissingExtra(error.name, "train")
    # Libraries wrap the system's error in their own; its words are all that stays.
    words = str(error)
    for number, cause, remedy in _FULL:
        if os.strerror(number) in words:
            return EdgekdError(cause, f"{remedy} and run the same command again.")
    if isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words:
        return EdgekdError("not enough memory.", "Lower the batch size or the context, or choose a smaller model.")
    if "gloo" in words or "NCCL" in words:
        return EdgekdError(
            "another process of the training has ended.",
            "See what it said, and start all of them again: training goes on from the last checkpoint.",
        )
    if isinstance(error, OSError) and error.errno:
        where = f"{error.filename}: " if error.filename else ""
        return EdgekdError(f"{where}{os.strerror(error.errno).lower()}.")
    return Fault(f"this is a fault in edgekd, not in your input: {type(error).__name__}: {words}.")

"""Work in a fresh process that cannot outlive this one, held to a device's limits where it stands for one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from ..errors import EdgekdError
from ..formats import plain, size
from .memory import Usage, usage

_POLL_S = 0.02


@dataclass(frozen=True)
class Limits:
    """What a process may have of this machine, as if it ran on a smaller device."""

    device: str
    threads: int | None = None
    memory_bytes: int | None = None
    memory_counts: Literal["anonymous", "rss"] = "anonymous"
    """What the device's system counts: iOS the memory that it cannot drop and read again, Android's killer all."""

    def sentences(self) -> list[str]:
        """What is held, in words."""
        words = [f"{self.threads} threads on as many CPUs"] if self.threads else []
        if self.memory_bytes:
            counted = "anonymous memory and swap" if self.memory_counts == "anonymous" else "resident memory and swap"
            words.append(f"{plain(size(self.memory_bytes))} of {counted}")
        return words

    def exceeded_by(self, held: Usage) -> bool:
        """Whether the device's system would end a process that holds so much."""
        return self.memory_bytes is not None and self.counted(held) > self.memory_bytes

    def counted(self, held: Usage) -> int:
        """Of what a process holds, what counts."""
        return (held.anonymous if self.memory_counts == "anonymous" else held.rss) + held.swap


def in_child(what: str, function: Callable[..., Any], *args: Any, limits: Limits | None = None) -> Any:
    """Call ``function`` in a fresh process and return what it returns.

    Args:
        what: the work, for messages.
        limits: the child runs on that many CPUs, and is killed as soon as it holds more memory.

    Raises:
        EdgekdError: the child raised, died, or was ended for its memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args, limits), daemon=True)
    process.start()
    sender.close()
    try:
        _await(what, process, receiver, limits)
        try:
            kind, value = receiver.recv()
        except EOFError:
            process.join()
            raise _death(what, process.exitcode) from None
    finally:
        # Ctrl-C lands here too: no child outlives this call.
        process.join(timeout=0 if sys.exc_info()[0] else 5)
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
    if kind == "error":
        raise EdgekdError(f"{what} failed: {value[0]}", value[1])
    return value


def _await(what: str, process: BaseProcess, receiver: Any, limits: Limits | None) -> None:
    """Wait until the child has answered or ended, and end it where it takes too much.

    Raises:
        EdgekdError: it did.
    """
    if limits is None or limits.memory_bytes is None:
        wait([receiver, process.sentinel])
        return
    while not wait([receiver, process.sentinel], _POLL_S):
        try:
            held = usage(process.pid or 0)
        except (OSError, ValueError, KeyError):  # it is ending, or this system does not tell
            continue
        if limits.exceeded_by(held):
            process.kill()
            raise EdgekdError(
                f"{what} was killed: it held {plain(size(limits.counted(held)))}, and {limits.device} gives an app "
                f"{plain(size(limits.memory_bytes))}.",
                "Export it with a smaller context, or take a smaller model.",
            )


def _child(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...], limits: Limits | None) -> None:
    """Entry point of a child process: one message back, then exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and kills
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if limits and limits.threads:
        _take_cpus(limits.threads)
    try:
        message = ("ok", function(*args))
    except EdgekdError as error:
        message = ("error", (error.cause, error.remedy))
    except MemoryError:
        message = ("error", ("memory ran out.", "Free some, or take a smaller model or context."))
    except Exception as error:  # a runtime may raise anything; the user gets one sentence
        message = ("error", (f"{type(error).__name__}: {error}", "Try: edgekd doctor"))
    sender.send(message)
    sender.close()


def _take_cpus(count: int) -> None:
    """Stay on the first CPUs that this process may use, where the system lets it choose."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _die_with_parent() -> None:
    """Wait for the parent's end, however it comes, and follow."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _death(what: str, exitcode: int | None) -> EdgekdError:
    """The error for a child that died without a word."""
    remedy = "Find out whether the runtime works here: edgekd doctor"
    if exitcode is None or exitcode >= 0:
        return EdgekdError(f"{what} ended without a result (exit code {exitcode}).", remedy)
    known = {int(number): number.name for number in signal.Signals}
    if known.get(-exitcode) == "SIGKILL":
        remedy = f"Memory may have run out: free some, or use a smaller model. {remedy}"
    return EdgekdError(f"{what} was ended by {known.get(-exitcode, f'signal {-exitcode}')}.", remedy)


def in_turns(count: int, rounds: int, seed: int = 0) -> list[Sequence[int]]:
    """For each round the numbers below ``count`` in a random order, the same for the same seed: whatever changes with
    time on the machine then meets all of them alike."""
    import random

    order = random.Random(seed)
    return [order.sample(range(count), count) for _ in range(rounds)]


def now() -> float:
    """A clock that parent and child share."""
    return time.perf_counter()

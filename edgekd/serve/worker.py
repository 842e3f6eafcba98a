"""One session, many clients: a thread that answers one request at a time, each client in turn."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ..errors import EdgekdError
from ..generation import Constraint, Generator, Piece, Sampling

MOST_WAITING = 64
_REMEMBERED = 4 * MOST_WAITING
_LOG = logging.getLogger(__name__)


class Busy(EdgekdError):
    """Too many requests wait."""


@dataclass(eq=False)
class Job:
    """A request's answer, as it is made by the worker and read by the event loop."""

    ids: Sequence[int]
    sampling: Sampling
    constraint: Constraint | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    cancelled: bool = False
    """Set by whoever no longer waits."""

    def __post_init__(self) -> None:
        self._pieces: deque[Piece] = deque()
        self._wanted = False  # the reader sleeps until something comes
        self._arrived, self._ended = asyncio.Event(), asyncio.Event()
        self._over = False
        self._error: BaseException | None = None

    def put(self, piece: Piece) -> None:
        """From the worker: what comes next."""
        self._pieces.append(piece)
        if self._wanted:  # waking the loop costs more than a token of a small model
            self._wanted = False
            self._tell(self._arrived)

    def end(self, error: BaseException | None = None) -> None:
        """From the worker: nothing more comes."""
        self._error, self._over = error, True
        self._tell(self._arrived, self._ended)

    def _tell(self, *events: asyncio.Event) -> None:
        try:
            for event in events:
                self.loop.call_soon_threadsafe(event.set)
        except RuntimeError:  # the loop has ended, and all who waited
            self.cancelled = True

    async def take(self) -> list[Piece]:
        """All pieces that have come since, at least one; none at the end.

        Raises:
            BaseException: what went wrong in the worker.
        """
        while not self._pieces and not self._over:
            self._arrived.clear()
            self._wanted = True
            if not self._pieces and not self._over:  # none came before that was seen
                await self._arrived.wait()
        pieces = [self._pieces.popleft() for _ in range(len(self._pieces))]
        if not pieces and self._error:
            raise self._error
        return pieces

    async def gather(self, seconds: float) -> None:
        """Let pieces come together for so long, or until the last has come."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()


class Turns:
    """Jobs that wait: next comes the client whose last turn is the longest ago, and each one's own keep their order."""

    def __init__(self) -> None:
        self._jobs: dict[str, deque[Job]] = {}
        self._turn: dict[str, int] = {}
        """When the clients of late had theirs, the latest last."""
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        """How many wait that somebody still waits for."""
        with self._changed:
            return self._count()

    def _count(self) -> int:
        return sum(not job.cancelled for jobs in self._jobs.values() for job in jobs)

    def put(self, client: str, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            Busy: too many wait.
        """
        with self._changed:
            if self._closed:
                return job.end()
            if self._count() >= MOST_WAITING:
                raise Busy(f"{MOST_WAITING} requests wait already.", "Try again later.")
            self._jobs.setdefault(client, deque()).append(job)
            self._changed.notify()

    def get(self) -> Job | None:
        """The next job, once there is one; None at the end."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            client = min(self._jobs, key=lambda name: self._turn.get(name, -1))
            jobs = self._jobs[client]
            job = jobs.popleft()
            if not jobs:
                del self._jobs[client]
            self._had(client)
            return job

    def _had(self, client: str) -> None:
        latest = max(self._turn.values(), default=0)
        self._turn.pop(client, None)
        self._turn[client] = latest + 1
        if len(self._turn) > _REMEMBERED:
            del self._turn[next(iter(self._turn))]

    def close(self) -> list[Job]:
        """Nobody gets a job any more; those that nobody has got."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left = [job for jobs in self._jobs.values() for job in jobs]
            self._jobs.clear()
            return left


class Worker:
    """The thread."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._turns = Turns()
        self._closing = False
        self.busy = False
        """An answer is being given."""
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._turns)

    def submit(self, client: str, job: Job) -> Job:
        """Put a job in the queue.

        Raises:
            Busy: too many wait.
        """
        self._turns.put(client, job)
        return job

    def stop(self) -> None:
        """Give up the answer that is being given, and begin no other."""
        self._closing = True
        for job in self._turns.close():
            job.end()

    def close(self) -> None:
        """Stop, and wait for the thread: nobody uses the session any more."""
        self.stop()
        self._thread.join()

    def _work(self) -> None:
        while (job := self._turns.get()) is not None:
            self.busy = True
            try:
                self._answer(job)
            except BaseException as error:  # whatever a runtime raises is its request's, and the next is served
                _LOG.warning("%s: %s", type(error).__name__, error)
                job.end(error)
            self.busy = False

    def _answer(self, job: Job) -> None:
        given = (job.ids, job.sampling, job.constraint)
        keep = job.sampling.seed is None  # what is asked for with a seed is asked for to be the same again
        for piece in self._generator.answer(*given, keep=keep, cancelled=lambda: job.cancelled or self._closing):
            job.put(piece)
        job.end()

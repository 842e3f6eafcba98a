"""The processes that train one student together, as torchrun starts them, and what they say to each other.

Parameters, gradients and moments are sharded over them by torch's FSDP2. Each process reads its share of a step's
windows; sums over all of them decide, so that a number that is none, or Ctrl-C to one process, stops all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import Agreed, EdgekdError
from ..files import atomic_folder

_PATIENCE = timedelta(days=30)  # the others wait while the first does what one process does alone


@dataclass(frozen=True)
class Ranks:
    """The processes, and which of them this is."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """What this process computes on."""
        from accelerate import PartialState

        return torch.device(PartialState().device)

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes; float64 ``(n,)`` on the CPU."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def tell(self, words: str = "") -> str:
        """The first process's words."""
        if self.count == 1:
            return words
        data = words.encode()
        size = torch.tensor([len(data)])
        torch.distributed.broadcast(size, 0)
        told = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if self.first and data
            else torch.empty(int(size), dtype=torch.uint8)
        )
        torch.distributed.broadcast(told, 0)
        return bytes(told.tolist()).decode()

    def wait(self) -> None:
        """Until all are here."""
        self.tell()

    def follow(self) -> str:
        """The first process's next words. Where it has ended, so does this one, without a word: it has said why.

        Raises:
            SystemExit: the first process has ended.
        """
        try:
            return self.tell()
        except RuntimeError:
            raise SystemExit(EdgekdError.exit_code) from None

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process does the body, then the others: what each of them would refuse is refused once."""
        if not self.first:
            self.follow()
        yield
        if self.first:
            self.wait()

    def check_alike(self, key: str) -> None:
        """Refuse processes that would train different things.

        Args:
            key: hex digest of what the training hangs on.

        Raises:
            Agreed: if one has another.
        """
        differs = float(self.tell(key) != key)
        if self.sum(torch.tensor([differs], dtype=torch.float64)).item():
            raise Agreed(
                f"The {self.count} processes do not agree on spec, seed, data, teacher or student.",
                "Give all of them the same spec and the same files.",
            )

    @contextmanager
    def folder(self, path: Path) -> Iterator[Path]:
        """A folder that all of them fill and that is renamed to ``path`` when whole, in place of an older one."""
        if self.count == 1:
            with atomic_folder(path, replace=True) as folder:
                yield folder
        elif self.first:
            with atomic_folder(path, replace=True) as folder:
                self.tell(str(folder))
                yield folder
                self.wait()
        else:
            yield Path(self.tell())
            self.wait()

    def share(self, windows: int) -> int:
        """How many of a step's windows each process reads.

        Raises:
            Agreed: they cannot be shared evenly.
        """
        if windows % self.count:
            raise Agreed(
                f"distill.batch_size: a step's {windows} windows (times gradient_accumulation) cannot be shared by "
                f"{self.count} processes.",
                f"Make their number a multiple of {self.count}.",
            )
        return windows // self.count


ALONE = Ranks()


def joined() -> Ranks:
    """The processes that torchrun started, connected; this one alone where it did not.

    Raises:
        EdgekdError: the others cannot be reached.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return ALONE
    if not torch.distributed.is_initialized():
        on_gpu = torch.cuda.is_available()
        try:
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise EdgekdError(
                f"The other processes cannot be reached: {str(error).splitlines()[0]:.200}.",
                "Start all of them with torchrun, and check --nnodes and --rdzv-endpoint.",
            ) from error
    return Ranks(torch.distributed.get_rank(), count)


def sharded(model: nn.Module, layers: nn.ModuleList, ranks: Ranks) -> None:
    """Shard a model over the processes, in place: each decoder layer, then what is left, by FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(parameter: Tensor) -> Tensor:
    """A parameter that may be sharded, on every process."""
    found = parameter.detach()
    return found.full_tensor() if hasattr(found, "full_tensor") else found

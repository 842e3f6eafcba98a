"""A training run's state on disk: safetensors and JSON, written whole or not at all, and the log that goes with it."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from ..errors import EdgekdError
from ..files import file_sha256, read_sealed, remove, sweep, write_sealed, write_text
from ..manifest import first_complaint
from .learner import set_rate
from .ranks import ALONE, Ranks

_PIECE_TENSORS = 32
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A line of ``log.jsonl``: what a step, or a validation, gave."""

    event: str
    """``step`` or ``validation``."""
    step: int
    steps: int
    figures: Mapping[str, float]
    unknown: Sequence[str] = ()
    """Figures that nobody could know; null in the line."""

    def line(self) -> str:
        """Its JSON."""
        told = {"event": self.event, "step": self.step, "steps": self.steps, **self.figures}
        return json.dumps(told | dict.fromkeys(self.unknown)) + "\n"


class Progress(BaseModel):
    """How far a run is, and the best it has seen."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validation: dict[str, int | float] = {}
    best_loss: float | None = None
    best_validation: dict[str, int | float] = {}
    best_step: int = 0
    validations_without_gain: int = 0
    stopped: bool = False


class _Sealed(BaseModel):
    """``progress.json``."""

    key: str
    files: dict[str, str]
    """sha256 of the tensor files."""
    progress: Progress


def save_checkpoint(
    work_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: dict[str, Tensor] | None,
    key: str,
    ranks: Ranks = ALONE,
) -> None:
    """Write ``checkpoint-STEP`` and remove the older ones; a kill at any moment leaves one of them whole.

    Several processes write their shards side by side; any number of them can go on from it.

    Args:
        best: the best weights so far, if the run keeps them.
        key: names what the run depends on; ``load_checkpoint`` refuses another.
    """
    final = work_dir / f"checkpoint-{progress.step}"
    with ranks.folder(final) as folder:
        for name, tensors in _state(model, optimizer, best).items():
            _write(tensors, folder, name, ranks)
        ranks.wait()
        if ranks.first:
            files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
            write_sealed(folder / "progress.json", {"key": key, "files": files, "progress": progress.model_dump()})
    if ranks.first:
        for older in _checkpoints(work_dir):
            if older != final:
                remove(older)


def load_checkpoint(
    work_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, key: str, ranks: Ranks = ALONE
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Bring ``model`` and ``optimizer`` to the newest whole checkpoint; a fresh ``Progress`` if there is none.

    Damaged ones are removed, with a warning.

    Returns:
        How far the run is, and its best weights if it keeps them.

    Raises:
        EdgekdError: the checkpoint is of another run.
    """
    newest = ranks.tell(_newest(work_dir) if ranks.first else "")
    if not newest:
        return Progress(), None
    folder = Path(newest)
    told = _Sealed.model_validate(read_sealed(folder / "progress.json"))
    if told.key != key:
        raise EdgekdError(f"{folder}: belongs to a run with another spec, seed, model or data.", f"Remove {work_dir}.")
    best = copy_of_weights(model) if any(name.startswith("best") for name in told.files) else None
    _make_moments(optimizer)
    tensors = {name: tensor for part in _state(model, optimizer, best).values() for name, tensor in part.items()}
    reader = HuggingFaceStorageReader(str(folder))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # it is not needed by one process
        dcp.load(dict(tensors), storage_reader=reader, no_dist=ranks.count == 1)
    return told.progress, best


def _newest(work_dir: Path) -> str:
    """The newest checkpoint that is whole, empty where there is none; damaged ones are removed."""
    sweep(work_dir)
    for folder in _checkpoints(work_dir):
        try:
            _check(folder)
            return str(folder)
        except EdgekdError as error:
            _LOG.warning("%s Training goes on from the checkpoint before it, or else from the start.", error.cause)
            remove(folder)
    return ""


def _check(folder: Path) -> None:
    """Compare every file with its digest.

    Raises:
        EdgekdError: one is missing or damaged.
    """
    sealed = read_sealed(folder / "progress.json")
    try:
        for name, expected in _Sealed.model_validate(sealed).files.items():
            if file_sha256(folder / name) != expected:
                raise EdgekdError(f"{folder / name}: is not what was written.")
    except ValidationError as error:
        raise EdgekdError(f"{folder}: damaged ({first_complaint(error)}).") from error
    except OSError as error:
        raise EdgekdError(f"{folder}: damaged ({error}).") from error


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor] | None
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, as it lies in memory, by file and by name."""
    parameters = dict(_learned(model))
    state = {
        "model": {f"model/{name}": parameter.detach() for name, parameter in parameters.items()},
        "optimizer": {
            f"optimizer/{name}:{key}{part}": tensor.detach() if tensor.ndim else tensor.detach().view(1)
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
            for part, tensor in _parts(value).items()
        },
    }
    return state if best is None else {**state, "best": {f"best/{name}": tensor for name, tensor in best.items()}}


def _parts(value: Tensor) -> dict[str, Tensor]:
    """The tensors that hold a value, by the ending of their names: of a moment in 8 bits its codes and scales. The
    table that codes stand in is always the same."""
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        return {"": value}
    names, _ = value.__tensor_flatten__()
    return {f".{name}": getattr(value, name) for name in names if name != "qmap"}


def _write(tensors: dict[str, Tensor], folder: Path, name: str, ranks: Ranks) -> None:
    """Safetensors: of one process a file, of several one of each process and some of the tensors."""
    if ranks.count == 1:
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
        return
    shards = folder / f".{name}"
    # A file is made in memory: pieces of it at a time.
    pieces = {key: 1 + number // _PIECE_TENSORS for number, key in enumerate(tensors)}
    writer = HuggingFaceStorageWriter(str(shards), pieces, save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer)
    ranks.wait()
    if ranks.first:
        for path in sorted(shards.glob("*.safetensors")):
            path.rename(folder / f"{name}-{path.name}")
        shards.rmdir()


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its state, which a step at rate zero does; the weights stay as they are."""
    set_rate(optimizer, 0.0)  # each step sets its own
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def drop_checkpoints(work_dir: Path) -> None:
    """Remove the checkpoints of a training whose outcome is safe elsewhere; its log stays."""
    for folder in _checkpoints(work_dir):
        remove(folder)


def _checkpoints(work_dir: Path) -> list[Path]:
    """Every checkpoint, the newest first."""
    folders = [folder for folder in work_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,18}", folder.name)]
    return sorted(folders, key=lambda folder: -int(folder.name.rpartition("-")[2]))


def _learned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained; tied ones once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that is trained; on the CPU, or where it is sharded."""
    return {
        name: parameter.detach().clone() if isinstance(parameter, DTensor) else parameter.detach().to("cpu", copy=True)
        for name, parameter in _learned(model)
    }


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The inverse of ``copy_of_weights``, in place.

    Raises:
        KeyError: a parameter is missing.
    """
    with torch.no_grad():
        for name, parameter in _learned(model):
            parameter.copy_(weights[name])


class RunLog:
    """``log.jsonl``, one line an event, and the same figures for TensorBoard.

    A resumed run drops the lines of the steps it will repeat, and writes TensorBoard's files anew from the rest, so
    that no step stands twice in either.
    """

    def __init__(self, work_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = work_dir / "log.jsonl"
        kept = [event for event in read_log(path) if event.step <= step]
        write_text(path, "".join(event.line() for event in kept))
        remove(work_dir / "tensorboard")
        self._file = path.open("a")
        self._writer = SummaryWriter(str(work_dir / "tensorboard"))  # type: ignore[no-untyped-call]
        for event in kept:
            self._to_tensorboard(event)

    def write(self, event: Event) -> None:
        """Add an event; it survives a kill of the process."""
        self._file.write(event.line())
        self._file.flush()
        self._to_tensorboard(event)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._writer.close()  # type: ignore[no-untyped-call]

    def _to_tensorboard(self, event: Event) -> None:
        for name, value in event.figures.items():
            self._writer.add_scalar(f"{event.event}/{name}", value, event.step)  # type: ignore[no-untyped-call]


def read_log(path: Path) -> list[Event]:
    """The events of a ``log.jsonl``; what is no event, as a line that a kill cut short, is left out."""
    if not path.is_file():
        return []
    return [event for line in path.read_text("utf-8", errors="replace").splitlines() if (event := _event(line))]


def _event(line: str) -> Event | None:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict):
        return None
    kind, step, steps = (told.pop(key, None) for key in ("event", "step", "steps"))
    if not (isinstance(kind, str) and isinstance(step, int)):
        return None
    steps = steps if isinstance(steps, int) else step
    figures = {name: value for name, value in told.items() if isinstance(value, int | float)}
    return Event(kind, step, steps, figures, [name for name, value in told.items() if value is None])


def validation_curve(path: Path) -> list[dict[str, float]]:
    """``step`` and ``validation_perplexity`` of every validation in a ``log.jsonl``."""
    return [
        {"step": event.step, "validation_perplexity": event.figures["perplexity"]}
        for event in read_log(path)
        if event.event == "validation" and "perplexity" in event.figures
    ]

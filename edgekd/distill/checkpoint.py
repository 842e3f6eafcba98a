"""A training run's state on disk: safetensors and JSON, written whole or not at all, and the log that goes with it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import EdgekdError
from ..files import atomic_folder, file_sha256, read_sealed, remove, sweep, write_sealed, write_text
from ..manifest import first_complaint

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A line of ``log.jsonl``: what a step, or a validation, gave."""

    event: str
    """``step`` or ``validation``."""
    step: int
    steps: int
    figures: Mapping[str, float]

    def line(self) -> str:
        """Its JSON."""
        return json.dumps({"event": self.event, "step": self.step, "steps": self.steps, **self.figures}) + "\n"


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
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: dict[str, Tensor] | None,
    key: str,
) -> None:
    """Write ``checkpoint-STEP`` and remove the older ones; a kill at any moment leaves one of them whole.

    Args:
        best: the best weights so far, if the run keeps them.
        key: names what the run depends on; ``load_checkpoint`` refuses another.
    """
    final = work_dir / f"checkpoint-{progress.step}"
    with atomic_folder(final, replace=True) as folder:
        save_file(weights_of(model), folder / "model.safetensors")
        save_file(_optimizer_state(model, optimizer), folder / "optimizer.safetensors")
        if best is not None:
            save_file(best, folder / "best.safetensors")
        files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        write_sealed(folder / "progress.json", {"key": key, "files": files, "progress": progress.model_dump()})
    for older in _checkpoints(work_dir):
        if older != final:
            remove(older)


def load_checkpoint(
    work_dir: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, key: str
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Bring ``model`` and ``optimizer`` to the newest whole checkpoint; a fresh ``Progress`` if there is none.

    Damaged ones are removed, with a warning.

    Raises:
        EdgekdError: the checkpoint is of another run.
    """
    sweep(work_dir)
    for folder in _checkpoints(work_dir):
        try:
            made_by, progress, states = _read_checkpoint(folder)
        except EdgekdError as error:
            _LOG.warning("%s Training goes on from the checkpoint before it, or else from the start.", error.cause)
            remove(folder)
            continue
        if made_by != key:
            raise EdgekdError(
                f"{folder}: belongs to a run with another spec, seed, model or data.", f"Remove {work_dir}."
            )
        set_weights(model, states["model"])
        _set_optimizer_state(model, optimizer, states["optimizer"])
        return progress, states.get("best")
    return Progress(), None


def _read_checkpoint(folder: Path) -> tuple[str, Progress, dict[str, dict[str, Tensor]]]:
    """The key, the progress, and the tensors of each file by its stem, all compared with their digests."""
    sealed = read_sealed(folder / "progress.json")
    states = {}
    try:
        told = _Sealed.model_validate(sealed)
        for name, expected in told.files.items():
            if file_sha256(folder / name) != expected:
                raise EdgekdError(f"{folder / name}: is not what was written.")
            states[Path(name).stem] = load_file(folder / name)
    except ValidationError as error:
        raise EdgekdError(f"{folder}: damaged ({first_complaint(error)}).") from error
    except (OSError, SafetensorError) as error:
        raise EdgekdError(f"{folder}: damaged ({error}).") from error
    return told.key, told.progress, states


def drop_checkpoints(work_dir: Path) -> None:
    """Remove the checkpoints of a training whose outcome is safe elsewhere; its log stays."""
    for folder in _checkpoints(work_dir):
        remove(folder)


def _checkpoints(work_dir: Path) -> list[Path]:
    """Every checkpoint, the newest first."""
    folders = [folder for folder in work_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,18}", folder.name)]
    return sorted(folders, key=lambda folder: -int(folder.name.rpartition("-")[2]))


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy on the CPU of every parameter; tied ones once."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def set_weights(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """The inverse of ``weights_of``, in place.

    Raises:
        KeyError: a parameter is missing.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as flat tensors ``PARAMETER:exp_avg``, ``PARAMETER:exp_avg_sq``, ``PARAMETER:step``."""
    return {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _set_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """The inverse of ``_optimizer_state``."""
    for name, parameter in model.named_parameters():
        prefix = f"{name}:"
        of_parameter = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        # torch keeps the step count on the CPU.
        moved = {n: t if n == "step" else t.to(parameter.device) for n, t in of_parameter.items()}
        if moved:
            optimizer.state[parameter] = moved


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
    return Event(kind, step, steps, {name: value for name, value in told.items() if isinstance(value, int | float)})


def validation_curve(path: Path) -> list[dict[str, float]]:
    """``step`` and ``validation_perplexity`` of every validation in a ``log.jsonl``."""
    return [
        {"step": event.step, "validation_perplexity": event.figures["perplexity"]}
        for event in read_log(path)
        if event.event == "validation" and "perplexity" in event.figures
    ]

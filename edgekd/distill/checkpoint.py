"""A training run's state on disk: safetensors and JSON, written whole or not at all, and the log that goes with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import EdgekdError
from ..files import atomic_folder, write_json, write_text


@dataclass
class Progress:
    """How far a run is, and the best it has seen."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)
    best_loss: float | None = None
    best_validation: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    validations_without_gain: int = 0
    stopped: bool = False


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
    if final.exists():
        return
    with atomic_folder(final) as folder:
        save_file(weights_of(model), folder / "model.safetensors")
        save_file(_optimizer_state(model, optimizer), folder / "optimizer.safetensors")
        if best is not None:
            save_file(best, folder / "best.safetensors")
        write_json(folder / "progress.json", {"key": key, **asdict(progress)})
    for folder in work_dir.glob("checkpoint-*"):
        if folder != final:
            shutil.rmtree(folder)


def load_checkpoint(
    work_dir: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, key: str
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Bring ``model`` and ``optimizer`` to the newest checkpoint; a fresh ``Progress`` if there is none.

    Raises:
        EdgekdError: the checkpoint is of another run, or damaged.
    """
    folders = sorted(work_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    # Removing an old folder may have been cut short, but only once a newer one was whole.
    for folder in folders[:-1]:
        shutil.rmtree(folder)
    if not folders:
        return Progress(), None
    newest = folders[-1]
    try:
        raw: dict[str, Any] = json.loads((newest / "progress.json").read_text())
        if raw.pop("key") != key:
            raise EdgekdError(
                f"{newest}: belongs to a run with another spec, seed, model or data.", f"Remove {work_dir}."
            )
        weights, state = load_file(newest / "model.safetensors"), load_file(newest / "optimizer.safetensors")
        best = load_file(newest / "best.safetensors") if (newest / "best.safetensors").exists() else None
        set_weights(model, weights)
        for name, parameter in model.named_parameters():
            prefix = f"{name}:"
            of_parameter = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            # torch keeps the step count on the CPU.
            moved = {n: t if n == "step" else t.to(parameter.device) for n, t in of_parameter.items()}
            if moved:
                optimizer.state[parameter] = moved
        return Progress(**raw), best
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise EdgekdError(f"{newest}: damaged checkpoint ({error}).", f"Remove {work_dir} to start anew.") from error


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


class RunLog:
    """``log.jsonl``, one line an event, and the same figures for TensorBoard.

    A resumed run drops the lines of the steps it will repeat, and writes TensorBoard's files anew from the rest, so
    that no step stands twice in either.
    """

    def __init__(self, work_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = work_dir / "log.jsonl"
        kept = [event for event in read_log(path) if event["step"] <= step]
        write_text(path, "".join(json.dumps(event) + "\n" for event in kept))
        shutil.rmtree(work_dir / "tensorboard", ignore_errors=True)
        self._file = path.open("a")
        self._writer = SummaryWriter(str(work_dir / "tensorboard"))  # type: ignore[no-untyped-call]
        for event in kept:
            self._to_tensorboard(event)

    def write(self, event: dict[str, Any]) -> None:
        """Add an event; it survives a kill of the process."""
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        self._to_tensorboard(event)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._writer.close()  # type: ignore[no-untyped-call]

    def _to_tensorboard(self, event: dict[str, Any]) -> None:
        for name, value in event.items():
            if name not in ("step", "steps", "event"):
                self._writer.add_scalar(f"{event['event']}/{name}", value, event["step"])  # type: ignore[no-untyped-call]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a ``log.jsonl``; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text("utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events

"""One of the processes that train a tiny student together: ``train_in_ranks.py WORK_DIR [FAULT ...]``.

Does a training for each FAULT, in WORK_DIR/FAULT, or one without in WORK_DIR. Prints each step, then how it ended, or
one line of JSON: the losses of all steps and validations, and the student's weights. A FAULT strikes in the last
process alone: ``nan`` (a teacher that says what is no number), ``data`` (another text), ``kill`` (SIGKILL in step 4),
``interrupt`` (SIGINT in step 4).
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from train_and_die import tiny

from edgekd.distill.data import Windows
from edgekd.distill.ranks import ALONE, Ranks, joined
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.train import train
from edgekd.errors import as_error
from edgekd.spec import DistillSpec


class Faulty(OnlineTeacher):
    """A teacher that strikes at its seventh batch, in step 4, or from there on."""

    def __init__(self, fault: str) -> None:
        super().__init__(tiny(2, 2, dropout=0.0).eval(), 64)
        self.__dict__ |= {"fault": fault, "calls": 0}

    def teach(self, ids, index=None, positions=None):
        self.__dict__["calls"] += 1
        outputs = super().teach(ids, index, positions)
        if self.calls == 7 and self.fault in ("kill", "interrupt"):
            os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGINT)
        spoiled = self.calls >= 7 and self.fault == "nan"
        return replace(outputs, hidden=outputs.hidden * torch.nan) if spoiled else outputs


def run(work_dir: Path, ranks: Ranks = ALONE, fault: str = "", tell=lambda event: None) -> dict:
    ids = torch.randint(0, 64, (40, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids, dtype=torch.uint8)
    mask[::2] = 0  # now and then, all that a process reads
    strikes = ranks.rank == ranks.count - 1
    if fault == "data" and strikes:
        ids[5] = 1
    losses = []

    def on_event(event):
        losses.append(event.figures["loss"])
        tell(event)

    model = tiny(1, 2, dropout=0.0)
    figures = train(
        model,
        Windows(ids, mask),
        Windows(ids[:5], torch.ones_like(ids[:5], dtype=torch.uint8)),
        DistillSpec(
            steps=6,
            batch_size=1 if ranks.count > 1 else 2,
            gradient_accumulation=4 if ranks.count > 1 else 2,
            warmup_steps=1,
            checkpoint_every=2,
            validate_every=3,
            patience=9,
            learning_rate=1e-2,
            precision="float32",
        ),
        signal=Faulty(fault if strikes else ""),
        seed=3,
        work_dir=work_dir,
        on_event=on_event,
        ranks=ranks,
    )
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return {"losses": losses, "weights": weights, "best": figures["validation"]["loss"]}


def tell(event) -> None:
    if event.event == "step":
        print("step", event.step, flush=True)


if __name__ == "__main__":
    work_dir, faults = Path(sys.argv[1]), sys.argv[2:]
    ranks = joined()
    for fault in faults or [""]:
        try:
            print(json.dumps(run(work_dir / fault, ranks, fault, tell)), flush=True)
        except (Exception, KeyboardInterrupt) as error:
            print("ended:", "interrupted" if isinstance(error, KeyboardInterrupt) else as_error(error), flush=True)

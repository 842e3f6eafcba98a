"""What a session scores at tasks, and how much of a reference's score that is."""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EdgekdError, MissingExtra
from ..files import Json
from ..manifest import Contract
from ..proof import Figure, TaskScore
from ..session import Session

HARNESS = "lm-evaluation-harness"
_SOURCE = f"measured:{HARNESS}"
_DRAWS = 2000
_SEED = 1234  # of the examples before a question, as the harness has it


def check_harness() -> None:
    """Refuse to begin without the harness.

    Raises:
        MissingExtra: it is not installed.
    """
    os.environ["TQDM_DISABLE"] = "1"  # progress is told once, by edgekd
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("lm_eval", "eval") from error


def score(
    session: Session,
    contract: Contract,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    tell: Callable[[float], None] = lambda share: None,
) -> list[TaskScore]:
    """A session's scores.

    Args:
        tasks: files, or names.
        limit: most documents of a task.
        fewshot: examples before each question; None: as the task has it.
        chat: put questions through the chat template.

    Raises:
        EdgekdError: there is no template; a task cannot be read, or the session cannot do it.
    """
    if chat and contract.chat_template is None:
        raise EdgekdError("--chat: the model has no chat template.", "Leave it out.")
    check_harness()
    from lm_eval.evaluator import evaluate

    from .lm import SessionLM
    from .tasks import load_tasks

    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_tasks(tasks, Path(scratch))
        for task in loaded["tasks"].values():
            _settle(task, fewshot)
        random.seed(0)
        np.random.seed(_SEED)
        try:
            found = evaluate(
                lm=SessionLM(session, contract, chat=chat, tell=tell),
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:  # a task that does not fit its data
            words = " ".join(str(error).split())[:300]
            raise EdgekdError(f"--tasks {', '.join(tasks)}: {type(error).__name__}: {words}.") from error
    return _scores(found, chat)


def _settle(task: Any, fewshot: int | None) -> None:
    """Give a task its examples, as the harness's own command does."""
    if fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def _scores(found: Json, chat: bool) -> list[TaskScore]:
    scores = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            samples = [s[metric] for s in found["samples"].get(task, []) if s.get("filter") == kind and metric in s]
            plain = [float(s) for s in samples if isinstance(s, bool | int | float | np.number)]
            error = _standard_error(plain)
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=kind,
                    fewshot=found["n-shot"].get(task, 0) or 0,
                    chat=chat,
                    higher_is_better=bool(found["higher_is_better"].get(task, {}).get(metric, True)),
                    documents=found["n-samples"][task]["effective"],
                    score=Figure(value=float(value), source=_SOURCE, samples=plain),
                    standard_error=error,
                )
            )
    return scores


def _standard_error(samples: Sequence[float]) -> float | None:
    """Of a mean."""
    return float(np.std(samples, ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else None


def beside(scores: Sequence[TaskScore], reference: Sequence[TaskScore], name: str) -> list[TaskScore]:
    """Scores with those of a reference beside them, of the same tasks."""
    by_key = {(score.task, score.metric, score.filter): score for score in reference}
    return [_with(score, by_key[score.task, score.metric, score.filter], name) for score in scores]


def _with(ours: TaskScore, theirs: TaskScore, name: str) -> TaskScore:
    retention, interval = None, None
    a, b = np.array(ours.score.samples), np.array(theirs.score.samples)
    if ours.higher_is_better and theirs.score.value:
        own = ours.score.value or 0.0
        retention = own / theirs.score.value
        if len(a) == len(b) > 1 and np.isclose([a.mean(), b.mean()], [own, theirs.score.value]).all():
            interval = _interval(a, b)
    told = {"reference": theirs.score, "reference_name": name, "retention": retention, "retention_ci95": interval}
    return ours.model_copy(update=told)


def _interval(ours: np.ndarray, theirs: np.ndarray) -> list[float] | None:
    """95 % of the ratio of two means over the same documents."""
    drawn = np.random.default_rng(0).integers(len(ours), size=(_DRAWS, len(ours)))
    below = theirs[drawn].mean(1)
    if not below.all():
        return None
    return [float(bound) for bound in np.quantile(ours[drawn].mean(1) / below, [0.025, 0.975])]

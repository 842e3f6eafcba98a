"""A run, from the spec to the report, in the order of reading.

``preflight`` resolves the spec into a ``Run`` and refuses what cannot be done, ``chain`` says which stages it has,
``runner`` does them (``work`` is what they do), and ``results`` judges and tells what was measured. ``verbs`` are the
single steps, for models and artifacts outside a run.
"""

from __future__ import annotations

from ..errors import GateFailed
from ..files import digest
from ..plan import measure_machine, refuse_what_cannot_fit
from ..results import Results
from .chain import stages
from .results import failures, results, write_results
from .run import Run
from .runner import Watcher, do_stages, held, take_part, to_do


def do_run(
    run: Run, watcher: Watcher, *, until: str | None = None, report_only: bool = False, check: bool = False
) -> Results | None:
    """Do every stage that is not done, then write ``results.json`` and ``report.html``.

    Of the processes that torchrun started, the first does so, and the others take part in the trainings.

    Args:
        until: stop after the stage of that name, without a report.
        report_only: measure the gates but do not fail on them.
        check: compare every file of the stages that are done with its sha256.

    Returns:
        What was measured; None in a process that took part.

    Raises:
        GateFailed: an artifact missed a threshold; the report is written all the same.
        DoesNotFit: a stage cannot fit the machine; nothing was done.
        Agreed: the processes' specs or files are not the same.
    """
    from ..distill.ranks import joined

    ranks = joined()
    machine = measure_machine(run.folder)
    chain = stages(run, machine)
    names = [stage.name for stage in chain]
    chain = chain[: names.index(until) + 1] if until else chain
    trainings = digest([stage.key for stage in chain if stage.together])
    if not ranks.first:
        take_part(run, chain, ranks, trainings)
        return None
    ranks.check_alike(trainings)
    with held(run, chain):
        faults = to_do(run, chain, check=check)
        refuse_what_cannot_fit({s.name: s.cost for s in chain if s.name in faults}, machine, run.folder)
        records = do_stages(run, [stage for stage in chain if stage.phase == "work"], faults, watcher, ranks)
        missed = failures(run, records)
        if report_only or not missed:
            records |= do_stages(run, [stage for stage in chain if stage.phase == "bench"], faults, watcher, ranks)
        told = results(run, records) if until else write_results(run, records)
    ranks.tell()  # nothing more for the others
    if missed and not report_only and not until:
        raise GateFailed(
            f"{len(missed)} gate{'s' * (len(missed) > 1)} failed: " + "; ".join(missed) + ".",
            f"See {run.folder / 'report.html'}, or go on with --report-only.",
        )
    return told

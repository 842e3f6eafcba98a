"""``edgekd-llama`` on a device: everything that the harness measures here, by the readings of a clock there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import EdgekdError
from ...files import Json
from ...manifest import Artifact, Contract
from ...proof import Host, Noise, Slice, Sustained
from ..children import Limits
from ..definitions import MOST_SILENT_TOKENS, Request
from ..energy import EnergyRun
from ..measure import CURVE_TOKENS, WARM_UP_TOKENS, ColdStart, CurvePoint, Repetition
from ..memory import Phase, Usage
from ..sustained import SLICES, change_point
from .place import Place, reads_answers
from .readings import battery_of, charged_meanwhile, noise_of, window_of

_BATCH_TOKENS = 512  # as edgekd's own session feeds llama.cpp
_WATCH_S = 0.1
"""Between two looks at a battery: some tell a new current ten times a second, and none much oftener."""


@dataclass(frozen=True)
class Pushed:
    """An artifact on the device."""

    model: str
    special: str
    """File of the special tokens' ids."""
    prompts: Mapping[int, str]
    """Files, by the number of their tokens."""
    texts: Mapping[int, str]
    context: int


@dataclass(frozen=True)
class LlamaSite:
    """A ``harness.Site``: a device with ``edgekd-llama`` on it, and artifacts by the names of their folders."""

    place: Place
    runner: str
    """Its path there."""
    pushed: Mapping[str, Pushed]
    host: Host
    threads: int
    limits: Limits | None = None
    buffer_bytes: int | None = None

    def hosts(self) -> Sequence[Host]:
        return [self.host] * len(self.pushed)

    def bandwidth(self) -> list[float]:
        return []

    @reads_answers
    def repetition(
        self, what: str, artifact: Artifact, lengths: Sequence[int], decode_tokens: int
    ) -> tuple[Repetition, Noise]:
        on = self._on(artifact)
        longest = on.prompts[lengths[-1]]
        steps = [
            "phase:load",
            f"text:{on.prompts[lengths[0]]}:{_silent(on, lengths[0])}",
            f"serve:{longest}:{min(WARM_UP_TOKENS, decode_tokens)}",
            *(f"text:{on.prompts[n]}:{_silent(on, n)}" for n in lengths),
            "phase:prefill",
            f"serve:{longest}:{decode_tokens}",
            "phase:decode",
        ]
        before = self.place.state()
        begun, loaded, told, _ = self._run(what, on, steps)
        noise = noise_of(before, self.place.state())
        load, first, _, *warm, prefill, decode, end = told
        phases = [_phase(told) for told in (load, prefill, end)]
        peaks = [phase.peak_rss for phase in [_phase(begun), *phases] if phase]
        run = Repetition(
            load_s=loaded["loaded"] - loaded["load_began"],
            first=_request(first, lengths[0]),
            warm={n: _request(request, n) for n, request in zip(lengths, warm, strict=True)},
            decode=_request(decode, lengths[-1]),
            memory=dict(zip(("load", "prefill", "decode"), phases, strict=True)),
            rss_before_load=loaded["rss_before"],
            peak_rss=max(peaks, default=0),
            vram=dict.fromkeys(("load", "prefill", "decode"), 0),
            torch_in_process=False,
            shortest_text=on.texts[lengths[0]],
        )
        return run, noise

    @reads_answers
    def cold_start(self, what: str, artifact: Artifact, run: Repetition) -> ColdStart:
        on, shortest = self._on(artifact), min(run.warm)
        self.place.run(what, [self.runner, "--drop", on.model])
        *_, (request,), end = self._run(what, on, [f"text:{on.prompts[shortest]}:{_silent(on, shortest)}"])
        chunks = request["chunks"]
        return ColdStart(chunks[0] - end["started"] if chunks else None, end["major_faults"], _known(end["read_bytes"]))

    @reads_answers
    def curves(self, what: str, artifact: Artifact, lengths: Sequence[int], seconds: float) -> Mapping[int, CurvePoint]:
        on, points, spent = self._on(artifact), dict[int, CurvePoint](), 0.0
        for i, length in enumerate(lengths):
            warm_up = f"serve:{on.prompts[lengths[0]]}:{WARM_UP_TOKENS}"
            *_, (_, told), _ = self._run(what, on, [warm_up, f"serve:{on.prompts[length]}:{CURVE_TOKENS}"])
            request = _request(told, length)
            points[length] = CurvePoint(request.ttft_s, request.decode_tokens / request.decode_s)
            spent += request.latency_s
            if i + 1 < len(lengths) and spent + request.latency_s * lengths[i + 1] / length > seconds:
                break
        return points

    @reads_answers
    def energy(
        self, what: str, artifact: Artifact, prompt_tokens: int, decode_tokens: int, seconds: float
    ) -> EnergyRun | str:
        battery, why_not = battery_of(self.place.state())
        if battery is None:
            return why_not
        on, text = self._on(artifact), self._on(artifact).prompts[prompt_tokens]
        room = min(on.context - prompt_tokens, max(decode_tokens, 256))
        # A phone's battery tells a new current a few times a second: idling takes as long as the rest.
        steps = [
            f"serve:{text}:{min(WARM_UP_TOKENS, decode_tokens)}",
            f"idle:{seconds:g}",
            f"prefill:{text}:{seconds:g}",
            f"decode:{text}:{room}:{seconds:g}",
            f"request:{text}:{decode_tokens}:{seconds:g}",
            f"idle:{seconds:g}",
        ]
        ran = self.place.run(what, self._command(on, steps), every_s=_WATCH_S, battery=battery)
        if charged_meanwhile(ran.ticks) or not any(tick.watts is not None for tick in ran.ticks):
            return "the battery was not discharged all the time"
        idle, prefill, decode, request, again = (
            window_of(ran.ticks, told["spans"], told["tokens"]) for told in _lines(ran.output)[3:-1]
        )
        return EnergyRun(["battery"], prompt_tokens, decode_tokens, (idle, again), prefill, decode, request)

    @reads_answers
    def sustained(self, what: str, artifact: Artifact, seconds: float) -> Sustained:
        on = self._on(artifact)
        shortest = on.prompts[min(on.prompts)]
        *_, (told,), _ = self._run(what, on, [f"sustain:{shortest}:{seconds:g}:{SLICES}"])
        slices = [Slice(seconds=wall, decode_tokens_per_s=count / busy) for wall, busy, count in told["slices"]]
        change, factor = change_point([one.decode_tokens_per_s for one in slices])
        return Sustained(slices=slices, change_slice=change, factor=factor)

    def _on(self, artifact: Artifact) -> Pushed:
        return self.pushed[str(artifact.folder)]

    def _command(self, on: Pushed, steps: Sequence[str]) -> list[str]:
        numbers = (on.context, self.threads, min(_BATCH_TOKENS, on.context))
        return [self.runner, on.model, *map(str, numbers), on.special, *steps]

    def _run(self, what: str, on: Pushed, steps: Sequence[str]) -> tuple[Json, Json, list[Json], Json]:
        """What the runner says before loading, of loading, of each step, and at its end."""
        begun, loaded, *told, end = _lines(self.place.run(what, self._command(on, steps)).output)
        if len(told) != len(steps):
            raise EdgekdError(f"{what}: the runner answered {len(told)} of {len(steps)} steps.", "Build it again.")
        return begun, loaded, told, end


def _lines(output: str) -> list[Json]:
    return [json.loads(line) for line in output.splitlines()]


def _silent(on: Pushed, length: int) -> int:
    return min(MOST_SILENT_TOKENS, on.context - length)


def _known(number: int) -> int | None:
    return None if number < 0 else number


def _phase(told: Json) -> Phase | None:
    if min(told[key] for key in ("peak_rss", "rss", "anonymous", "swap", "pss")) < 0:
        return None
    rss, anonymous = told["rss"], told["anonymous"]
    return Phase(told["peak_rss"], Usage(rss, anonymous, rss - anonymous, told["swap"], told["pss"]))


def _request(told: Json, tokens: int) -> Request:
    """The readings of a request.

    Raises:
        EdgekdError: the tokenizer there reads the prompt otherwise than the one here.
    """
    if told["prompt_tokens"] != tokens:
        raise EdgekdError(
            f"the runner reads {told['prompt_tokens']} tokens where edgekd reads {tokens}.",
            "Build it with the llama.cpp that edgekd uses here.",
        )
    readings = {key: told[key] for key in Request.__dataclass_fields__}
    return Request(**readings)


def prompt_text(contract: Contract, text: str) -> str:
    """A text with the space that the contract leaves to the caller."""
    return f" {text}" if contract.space_prefix and text[:1] not in (" ", "▁") else text

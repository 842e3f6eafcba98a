"""What a million requests cost in money, energy and carbon: the teacher hosted, the student on the device.

A hosted teacher is paid by the token; its energy is a published figure. The student costs its electricity: from a
counter where one was read, else from the device's published watts, and then it is an estimate and says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..errors import EdgekdError, SpecError
from ..manifest import Manifest
from ..proof import Benchmark
from ..spec import checked
from ..strict_yaml import read_yaml
from .predict import Estimate, speeds
from .profiles import Profile

_MILLION = 10**6
_J_PER_KWH = 3.6e6


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Price(_Strict):
    """A number of the world outside."""

    value: Annotated[float, Field(ge=0, le=1e6)]
    unit: str
    basis: str
    source: str
    date: str


class Prices(_Strict):
    """What costs are computed from."""

    price_in: Price
    price_out: Price
    hosted_energy: Price
    electricity: Price
    carbon: Price

    def with_own(self, **own: float | None) -> Prices:
        """The same, with the user's figures in place of the defaults."""
        given = {key: value for key, value in own.items() if value is not None}
        made = {
            key: getattr(self, key).model_copy(update={"value": value, "basis": "yours", "source": "yours", "date": ""})
            for key, value in given.items()
        }
        return self.model_copy(update=made)


def default_prices() -> Prices:
    """The published figures that come with edgekd."""
    path = Path(str(resources.files("edgekd.benchmarks.anchors") / "costs.yaml"))
    return checked(Prices, read_yaml(path, SpecError), str(path))


class Side(BaseModel):
    """A million requests of one side; what is unknown is null."""

    model_config = ConfigDict(frozen=True)

    usd: float | None
    energy_kwh: float | None
    carbon_kg: float | None
    source: str


class Cost(BaseModel):
    """Both sides, and how many times less the student takes."""

    model_config = ConfigDict(frozen=True)

    artifact: str
    device: str
    prompt_tokens: int
    output_tokens: int
    teacher: Side
    student: Side
    cheaper: float | None
    less_energy: float | None
    prices: Prices
    remarks: list[str]


def cost(
    name: str, manifest: Manifest, profile: Profile | None, prompt_tokens: int, output_tokens: int, prices: Prices
) -> Cost:
    """Compare both for a million requests of so many tokens.

    Args:
        name: of the artifact.
        profile: the device; None: the machine that the artifact was benchmarked on.
    """
    paid = prompt_tokens * prices.price_in.value + output_tokens * prices.price_out.value
    hosted_kwh = output_tokens * prices.hosted_energy.value * _MILLION / _J_PER_KWH
    teacher = Side(
        usd=paid,
        energy_kwh=hosted_kwh,
        carbon_kg=hosted_kwh * prices.carbon.value / 1000,
        source=f"estimated:{prices.hosted_energy.basis}",
    )
    joules = _request(manifest, profile, prompt_tokens, output_tokens)
    student = _student(joules, prices)
    usd, kwh = student.usd, student.energy_kwh
    return Cost(
        artifact=name,
        device=profile.title if profile else _machine(manifest.benchmark),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        teacher=teacher,
        student=student,
        cheaper=paid / usd if usd else None,
        less_energy=hosted_kwh / kwh if kwh else None,
        prices=prices,
        remarks=list(_remarks(joules)),
    )


def _machine(benchmark: Benchmark | None) -> str:
    return (benchmark and (benchmark.machine.device or benchmark.machine.cpu)) or "this machine"


def _student(joules: Estimate, prices: Prices) -> Side:
    if joules.value is None:
        return Side(usd=None, energy_kwh=None, carbon_kg=None, source=f"unknown: {joules.reason}")
    kwh = joules.value * _MILLION / _J_PER_KWH
    usd, carbon = kwh * prices.electricity.value, kwh * prices.carbon.value / 1000
    return Side(usd=usd, energy_kwh=kwh, carbon_kg=carbon, source=str(joules.source))


def _request(manifest: Manifest, profile: Profile | None, prompt: int, output: int) -> Estimate:
    """Joules of a request."""
    if profile is None:
        return _counted(manifest.benchmark or Benchmark(), prompt, output)
    if profile.power is None:
        return Estimate(value=None, unit="J", reason=f"no power of {profile.title} is sourced")
    _, decode, prefill = speeds(manifest, profile, prompt)
    if decode.value is None:
        return Estimate(value=None, unit="J", reason=decode.reason)
    # A prompt is never read more slowly than it would be written: that bounds what is not known.
    seconds = prompt / (prefill.value or decode.value) + output / decode.value
    return Estimate(value=profile.power.value * seconds, unit="J", source=f"estimated:{profile.power.basis}")


def _counted(benchmark: Benchmark, prompt: int, output: int) -> Estimate:
    prefill, decode = benchmark.prefill_energy_j_per_token, benchmark.decode_energy_j_per_token
    if prefill.value is None or decode.value is None:
        reason = decode.reason or prefill.reason
        return Estimate(value=None, unit="J", reason=f"{reason}; name a device with --profile to estimate it")
    return Estimate(value=prompt * prefill.value + output * decode.value, unit="J", source=decode.source)


def _remarks(joules: Estimate) -> Iterable[str]:
    yield "the student's cost is its electricity alone: the device is the user's, and there already"
    yield "the teacher's energy is that of the tokens it writes; what its prompts take is not published and left out"
    if joules.source and joules.source.startswith("estimated"):
        yield "the student's energy is an estimate from published watts; no counter was read"


def check_tokens(prompt_tokens: int, output_tokens: int, context: int) -> None:
    """Refuse requests that a context does not hold.

    Raises:
        EdgekdError: they are longer.
    """
    if prompt_tokens + output_tokens > context:
        raise EdgekdError(
            f"--prompt-tokens {prompt_tokens} and --output-tokens {output_tokens} exceed the context of {context}.",
            "Lower one of them.",
        )

"""Devices as strict YAML: every number has a unit, a basis, a source and a date, or the file is refused.

A profile holds a run on this machine to the device's limits, or is what ``predict`` predicts for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...errors import SpecError
from ...spec import checked, nearest
from ...strict_yaml import read_yaml
from ..children import Limits

DeviceClass = Literal["gpu", "apple", "cpu"]
"""How its memory is read: a GPU's own, Apple's unified one by its GPU, or by the cores of a CPU, phones included."""
Word = Annotated[str, Field(min_length=1, max_length=400)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Quantity(_Strict):
    """A number and where it comes from."""

    value: Annotated[float, Field(gt=0, lt=1e9)]
    unit: Literal["GB", "GB/s", "TFLOPS", "W", "threads", "ratio"]
    basis: Word = Field(description="How it was found: spec, measured, arithmetic from what.")
    source: Word
    date: Annotated[str, Field(pattern=r"^20\d\d(-\d\d)?(-20\d\d)?$")]
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="Least and greatest, where sources disagree."
    )

    @property
    def ends(self) -> tuple[float, float]:
        """Least and greatest that it may be."""
        return (self.range[0], self.range[1]) if self.range else (self.value, self.value)

    @model_validator(mode="after")
    def _is_in_its_range(self) -> Quantity:
        low, high = self.ends
        if not 0 < low <= self.value <= high:
            raise ValueError(f"value {self.value:g} is not within its range")
        return self


_UNITS = {
    "ram": "GB",
    "app_memory": "GB",
    "threads": "threads",
    "bandwidth": "GB/s",
    "decode_read_rate": "GB/s",
    "compute": "TFLOPS",
    "power": "W",
    "sustained_factor": "ratio",
}


class Profile(_Strict):
    """A device. What nobody could source is left out, and what depends on it is unknown."""

    name: str = ""
    """The file's, without its ending."""
    title: Word
    kind: Literal["laptop", "desktop", "mini-pc", "board", "phone", "gpu"]
    device_class: DeviceClass = Field(alias="class")
    chip: Word
    memory_counts: Literal["anonymous", "rss"] = Field(
        "rss", description="What the system counts against an app: on iOS memory that it cannot drop and read again."
    )
    ram: Quantity | None = None
    app_memory: Quantity | None = Field(None, description="What the system lets one app have.")
    threads: Quantity | None = None
    bandwidth: Quantity | None = Field(None, description="Of its memory.")
    decode_read_rate: Quantity | None = Field(
        None, description="Bytes of weights that decoding reads a second, by published speeds of this very chip."
    )
    compute: Quantity | None = Field(None, description="fp16 products.")
    power: Quantity | None = Field(None, description="While decoding.")
    sustained_factor: Quantity | None = Field(None, description="Speed when hot over speed when cold.")

    @model_validator(mode="after")
    def _units_are_those_of_the_keys(self) -> Profile:
        for key, unit in _UNITS.items():
            quantity = getattr(self, key)
            if quantity and quantity.unit != unit:
                raise ValueError(f"{key}: unit {quantity.unit} instead of {unit}")
        return self

    def limits(self) -> Limits:
        """What it leaves a run on this machine.

        Raises:
            SpecError: it says nothing that a run could be held to.
        """
        threads = round(self.threads.value) if self.threads else None
        memory = round(self.app_memory.value * 1e9) if self.app_memory else None
        if threads is None and memory is None:
            raise SpecError(
                f"profile {self.name}: it gives neither threads nor app_memory to hold a run to.",
                f"Predict instead: edgekd predict ARTIFACT --profile {self.name}",
            )
        return Limits(self.title, threads, memory, self.memory_counts)


def profile_names() -> list[str]:
    """The profiles that come with edgekd."""
    folder = resources.files(__name__)
    return sorted(Path(str(item)).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_profile(name: str) -> Profile:
    """A shipped profile by its name, or a file of one's own.

    Raises:
        SpecError: there is none, or it lacks something: file and key are named.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        names = profile_names()
        if name not in names:
            raise SpecError(f"unknown profile {name!r:.200}; {nearest(name, names)}")
        path = Path(str(resources.files(__name__) / f"{name}.yaml"))
    values = read_yaml(path, SpecError)
    if not isinstance(values, Mapping):
        raise SpecError(f"{path}: a profile is keys and values.", "Begin from a shipped one.")
    return checked(Profile, {**values, "name": path.stem}, str(path))

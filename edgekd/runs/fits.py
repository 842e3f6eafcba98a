"""The shape of a cut student whose spec names a number of parameters and a device instead of layers and widths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..architecture import read_architecture
from ..benchmarks.profiles import Profile, load_profile
from ..distill.shape import Search, shapes
from ..errors import SpecError
from ..spec import DEFAULT_CONTEXT, CutStudent
from ..targets import load_recipe


def search(spec: CutStudent, teacher: Mapping[str, object], base: Path) -> Search:
    """Every depth's shape, and the device's room.

    Args:
        spec: with ``parameters`` and ``fits``.
        teacher: its ``config.json``.
        base: folder that a profile's path starts from.

    Raises:
        EdgekdError: an unknown profile or recipe, or one that says too little; no shape has so many parameters.
    """
    assert spec.fits is not None
    profile, longest = _profile(spec.fits.profile, base), read_architecture(teacher).context_length
    context = spec.fits.context or min(longest, DEFAULT_CONTEXT)
    if longest and context > longest:
        raise SpecError(
            f"key 'student.fits.context': {context} tokens are more than the teacher's context of {longest}.",
            "Lower it.",
        )
    fewest = 2 if spec.choose == "even" else 1
    found = shapes(teacher, load_recipe(spec.fits.recipe), spec.wanted, context, fewest)
    assert profile.app_memory is not None
    return Search(found, profile.title, round(1e9 * profile.app_memory.value), context)


def _profile(name: str, base: Path) -> Profile:
    """A profile that says what memory there is."""
    profile = load_profile(str(base / name) if name.endswith((".yaml", ".yml")) else name)
    if profile.app_memory is None:
        raise SpecError(
            f"student.fits.profile: what {profile.title} gives an app is not sourced (app_memory).",
            "Name another, or a file of your own that says it.",
        )
    return profile


def shaped(spec: CutStudent, teacher: Mapping[str, object], base: Path) -> CutStudent:
    """The student with layers and widths in place of ``parameters`` and ``fits``.

    Raises:
        EdgekdError: as ``search``; none fits.
    """
    return spec if spec.fits is None else written(spec, search(spec, teacher, base))


def written(spec: CutStudent, found: Search) -> CutStudent:
    """The student as a spec has it that names the chosen shape itself."""
    taken = found.taken()
    return CutStudent(
        init="cut",
        layers=taken.layers,
        hidden_size=taken.hidden_size,
        intermediate_size=taken.intermediate_size,
        choose=spec.choose,
    )

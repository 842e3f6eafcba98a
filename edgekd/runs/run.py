"""A run: a spec, the folder it works in, and everything that the two resolve to, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import Checkpoint
from ..spec import Method, Spec, TargetSpec
from ..student import check_model, load_model, load_tokenizer, resolve_model, student_config
from ..targets import label, load_recipe, section, stand_in
from .fits import shaped

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ..quant.recipe import Recipe


@dataclass(frozen=True)
class Model:
    """A model that is there before the run, and whether the user trusts the code in it: nothing else opens it."""

    checkpoint: Checkpoint
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.checkpoint.folder

    @property
    def config(self) -> Mapping[str, object]:
        """Its ``config.json``."""
        return self.checkpoint.config

    def check(self) -> None:
        """Refuse what cannot be read, without its weights in memory.

        Raises:
            EdgekdError: as ``student.load_tokenizer`` and ``student.check_model``.
        """
        self.tokenizer()
        check_model(self.folder, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    def model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model, in float32 unless ``dtype`` says otherwise."""
        return load_model(self.folder, dtype, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Quantization:
    """A quantized student to make: a recipe, and the method that chooses its integers."""

    recipe: Recipe
    method: Method

    @property
    def name(self) -> str:
        """For people: ``portable-int4 gptq``."""
        return f"{self.recipe.name} {self.method}"

    @property
    def folder(self) -> str:
        """Where it lies in the run."""
        return f"quantized/{self.recipe.name}-{self.method}"


@dataclass(frozen=True)
class Export:
    """An artifact to make."""

    target: TargetSpec
    recipe: Recipe
    label: str
    packs: Quantization | None
    """The quantized student whose integers it packs; None for a recipe that is not on the grid."""
    stand_in: str | None
    """What opens it on this machine in place of its own runtime."""

    @property
    def folder(self) -> str:
        """Where it lies in the run."""
        return f"artifacts/{self.label}"


@dataclass(frozen=True)
class Run:
    """A spec, its folder, and what was resolved from it. Folders of stages are relative POSIX names."""

    spec: Spec
    folder: Path
    base: Path
    """What relative paths of the spec start from."""
    words: Sequence[str]
    """The command that began it, but for the folder."""
    seeds: Sequence[int]
    """The spec's own first: its student is quantized and exported, the others' tell how much the seed moves."""
    teachers: Sequence[Model]
    """The one whose tokenizer the student has first; none where a server runs it."""
    initial: Model | None
    """The checkpoint that the student starts from, if there is one."""
    student_config: Mapping[str, object]
    """``config.json`` of the student that will be; where a cut is still to choose its layers, of evenly spaced ones."""
    quantizations: Sequence[Quantization]
    """Of a recipe, the exported one comes last."""
    exports: Sequence[Export]

    @property
    def trains(self) -> bool:
        """Whether a student is trained; if not, the initial checkpoint is the student."""
        return self.spec.teacher is not None

    @property
    def same_ids(self) -> bool:
        """Whether teachers are here whose ids are the student's."""
        spec = self.spec.teacher
        return spec is not None and not spec.served and spec.alignment == "ids"

    @property
    def hops_from_teacher(self) -> bool:
        """Whether the ledger begins at the teacher: its ids are the student's, and no other taught beside it."""
        return self.same_ids and len(self.teachers) == 1

    @property
    def teacher(self) -> Model | None:
        """The first teacher; None: there is none, or a server runs it."""
        return self.teachers[0] if self.teachers else None

    def path(self, stage_folder: str) -> Path:
        """Where a stage's result lies."""
        return self.folder / stage_folder

    @property
    def student(self) -> Path:
        """The student's model folder."""
        return self.path("student") if self.trains else self.reader.folder

    @property
    def reader(self) -> Model:
        """Whose tokenizer the student has."""
        model = self.teacher if self.same_ids else self.initial
        assert model is not None  # the spec has one of them
        return model

    @property
    def state(self) -> Path:
        """Where records, the lock and the state of trainings lie."""
        return self.folder / ".edgekd"

    @property
    def chooses_cut(self) -> bool:
        """Whether text decides what the student keeps of the teacher."""
        return self.spec.student.init == "cut" and self.spec.student.choose == "greedy"

    def trained(self, seed: int) -> dict[str, str]:
        """Folders of what is trained with a seed: the student and, if wanted, the baseline on labels alone."""
        names = ("student", "baseline") if self.spec.distill.baseline else ("student",)
        return {name: self.of_seed(seed, name) for name in names}

    def of_seed(self, seed: int, name: str) -> str:
        """Folder of a stage that every seed has."""
        return name if seed == self.spec.seed else f"seeds/{seed}/{name}"


def resolve(spec: Spec, *, base: Path, folder: Path, words: Sequence[str], more_seeds: Sequence[int]) -> Run:
    """Everything that a spec names, found and read.

    Raises:
        EdgekdError: a model, target or recipe is missing, or the student cannot be built.
    """
    named = spec.teacher.each if spec.teacher and not spec.teacher.served else []
    teachers = [Model(Checkpoint(resolve_model(one.model, base)), one.trust_remote_code) for one in named]
    if spec.student.init == "cut":
        spec = spec.model_copy(update={"student": shaped(spec.student, teachers[0].config, base)})
    initial = None
    if spec.student.init == "checkpoint":
        initial = Model(Checkpoint(resolve_model(spec.student.model, base)))
    pairs = [(section(target), load_recipe(name, target.target)) for target in spec.targets for name in target.recipes]
    quantizations = _quantizations(spec, [recipe for _, recipe in pairs])
    packed = {quantization.recipe.name: quantization for quantization in quantizations}
    exports = [
        Export(
            target,
            recipe,
            label(target.target, recipe.name),
            packed.get(recipe.name),
            stand_in(target.target, target.own_keys),
        )
        for target, recipe in pairs
    ]
    if initial:
        student = initial.config
    else:
        assert teachers and spec.student.init != "checkpoint"
        student = student_config(spec.student, teachers[0].config, base)
    return Run(spec, folder, base, words, [spec.seed, *more_seeds], teachers, initial, student, quantizations, exports)


def _quantizations(spec: Spec, recipes: Sequence[Recipe]) -> list[Quantization]:
    """Every quantized student to make, the exported one of a recipe last."""
    rounded: list[Method] = ["rtn"]
    return [
        Quantization(recipe, method)
        for recipe in {r.name: r.with_bits(spec.quantize.bits) for r in recipes if r.on_grid}.values()
        for method in (spec.quantize.methods if recipe.has_int4 else rounded)
    ]

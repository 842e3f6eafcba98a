"""An ``.mlpackage``: a folder whose ``Manifest.json`` names the model specification, which names the weight files."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, StrictStr, ValidationError

from ....errors import BadArtifact, MissingExtra, Unsupported
from ....files import read_json
from ....manifest import first_complaint
from .weights import WeightFile

MODEL_PATH = "@model_path/"  # how a program names the folder of its specification


class _Item(BaseModel):
    path: StrictStr


class _Contents(BaseModel):
    """What ``Manifest.json`` says of the package's files."""

    rootModelIdentifier: StrictStr
    itemInfoEntries: dict[str, _Item]


@cache
def proto(name: str) -> ModuleType:
    """A module of coremltools' protobuf classes: ``Model_pb2`` or ``MIL_pb2``.

    ``import coremltools`` takes seconds and prints a page of warnings, so its folder ``proto`` is imported alone,
    under a name of its own. A later import of coremltools finds the same classes: protobuf keeps one of each.

    Raises:
        MissingExtra: coremltools is not installed.
    """
    alias = "_coremltools_proto"
    if alias not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            raise MissingExtra("coremltools", "coreml")
        folder = Path(found.submodule_search_locations[0]) / "proto"
        spec = importlib.util.spec_from_file_location(
            alias, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec and spec.loader
        sys.modules[alias] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[alias])
    return importlib.import_module(f"{alias}.{name}")


class Package:
    """An opened package: its specification, and its weight files by the names the program gives them.

    Raises:
        BadArtifact: a file is missing or damaged, or a path leaves the package.
        Unsupported: it holds no ML program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = self._inside(path / "Data" / self._root_item())
        self.spec: Any = proto("Model_pb2").Model()
        try:
            self.spec.ParseFromString(self._model.read_bytes())
        except OSError as error:
            raise self._damaged(self._model, f"cannot be read: {error}") from error
        except Exception as error:  # protobuf's DecodeError, which differs between its implementations
            raise self._damaged(self._model, f"is no model specification: {error}") from error
        kind = self.spec.WhichOneof("Type")
        if kind is None:
            raise self._damaged(self._model, "holds no model")
        if kind != "mlProgram":
            raise Unsupported(f"{path} holds {kind}, not an ML program.", "Convert it to an mlprogram.")
        self._weights: dict[str, WeightFile] = {}

    def weights(self, name: str) -> WeightFile:
        """A weight file.

        Raises:
            BadArtifact: the path leaves the package.
        """
        if name not in self._weights:
            if not name.startswith(MODEL_PATH):
                raise self._damaged(self._model, f"names the weight file {name!r}, outside the package")
            self._weights[name] = WeightFile(self._inside(self._model.parent / name.removeprefix(MODEL_PATH)))
        return self._weights[name]

    def _root_item(self) -> str:
        """The path of the specification below ``Data``."""
        manifest = self.path / "Manifest.json"
        content = read_json(manifest, BadArtifact, "Export the package again.")
        try:
            told = _Contents.model_validate(content)
            return told.itemInfoEntries[told.rootModelIdentifier].path
        except ValidationError as error:
            raise self._damaged(manifest, f"does not name a model: {first_complaint(error)}") from error
        except KeyError as error:
            raise self._damaged(manifest, f"does not name a model: {error}") from error

    def _inside(self, path: Path) -> Path:
        if "\0" in str(path) or not path.resolve().is_relative_to(self.path.resolve()):
            raise self._damaged(self.path, f"names the file {str(path)!r}, outside the package")
        return path

    def _damaged(self, path: Path, what: str) -> BadArtifact:
        return BadArtifact(f"{path} {what}.", "Export the package again.")

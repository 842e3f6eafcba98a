"""What the exporters share that concerns the artifact's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import EdgekdError
from ..manifest import Artifact, write_artifact


def build_artifact(out_dir: Path, fill: Callable[[Path], dict[str, Any]]) -> Artifact:
    """Make an artifact that appears only when whole.

    Args:
        out_dir: its folder, which must not exist.
        fill: writes every file but the manifest into an empty folder, and returns the manifest's fields.

    Raises:
        EdgekdError: ``out_dir`` exists, or cannot be written.
    """
    if out_dir.exists():
        raise EdgekdError(f"{out_dir} exists already.", "Remove it, or choose another folder.")
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        artifact = write_artifact(partial, **fill(partial))
        partial.rename(out_dir)
    except OSError as error:
        raise EdgekdError(f"{out_dir}: cannot be written: {error}.", "Free disk space, or check the folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Artifact(out_dir, artifact.manifest)

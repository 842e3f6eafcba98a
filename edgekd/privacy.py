"""Nothing leaves this machine unasked: what libraries send and fetch is off before the first of them is imported.

The package imports this module before all else, and child processes inherit the environment. ``docs/privacy.md`` says,
library by library, what would happen without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SILENCE = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime and its genai; their API comes too late, the import writes already
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, transformers, hf_xet
    "HF_XET_TELEMETRY_ENABLED": "0",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts the loading of a local file too
    "DO_NOT_TRACK": "1",
}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_OURS = "EDGEKD_OFFLINE"
"""Set where the user had not chosen to be offline: what we forbade, ``online`` may lift, also in a child process."""
_READ_AT_IMPORT = ("huggingface_hub.constants", "datasets.config")
"""Modules that hold the environment's word as a constant."""
_TRUE = {"1", "ON", "YES", "TRUE"}


def silence() -> None:
    """Turn telemetry off and the network away, for the libraries that are imported already too."""
    if not any(os.environ.get(name, "").upper() in _TRUE for name in _OFFLINE):
        os.environ[_OURS] = "1"
    os.environ.update(_SILENCE)
    _set_offline(True)


@contextmanager
def online() -> Iterator[None]:
    """Let the Hub be asked for what the user named of it. A user who set ``HF_HUB_OFFLINE`` himself stays offline."""
    if _OURS not in os.environ:
        yield
        return
    _set_offline(False)
    try:
        yield
    finally:
        _set_offline(True)


def _set_offline(offline: bool) -> None:
    os.environ.update(dict.fromkeys(_OFFLINE, "1" if offline else "0"))
    for module in filter(None, map(sys.modules.get, _READ_AT_IMPORT)):
        vars(module).update(HF_HUB_OFFLINE=offline, HF_HUB_DISABLE_TELEMETRY=True, HF_UPDATE_DOWNLOAD_COUNTS=False)

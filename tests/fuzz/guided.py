"""The same harnesses driven by atheris, which keeps the inputs that reach new lines of edgekd.

    pip install -e ".[fuzz]"
    python tests/fuzz/guided.py spec -max_total_time=3600

What follows the kind is libFuzzer's. It ends at the first fault and leaves the choices that led there in a file
``crash-…``; give that file as the last word to see the fault again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["edgekd"]):
    from edgekd.errors import Fault, as_error
    from harnesses import HARNESSES
    from mutate import mutate
    from run import feed


def main() -> None:
    """The command."""
    kind, *options = sys.argv[1:]
    corpus = Path("build/fuzz", f"{kind}-guided")
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["edgekd"]):
        harness = HARNESSES[kind](Path(tempfile.mkdtemp(prefix="fuzz-")))
        for seed in harness.seeds:
            feed(harness.check, seed)  # imports what it needs

    def one(choices: bytes) -> None:
        source = atheris.FuzzedDataProvider(choices)
        data = mutate(harness.seeds, harness.form, lambda n: source.ConsumeIntInRange(0, n - 1))
        error = feed(harness.check, data)
        if error is not None and isinstance(as_error(error), Fault):
            print(f"the input: {data[:2000]!r}", file=sys.stderr)
            raise error

    # A few hundred choices make an input; shorter ones leave the tail of it as it was.
    atheris.Setup([sys.argv[0], "-max_len=512", "-len_control=0", *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Damage artifacts by the thousand, with their sums put right, and open each in a process forked for it.

A mutant goes through what ``targets.try_artifact`` runs in its child; one that passes is opened a second time as a
caller would, without the child's limits. By hand: ``python tests/fuzz/artifacts.py ARTIFACT --count 10000``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekd import trial
from edgekd.errors import EdgekdError
from edgekd.manifest import MANIFEST, load_artifact
from edgekd.targets import load_target, run_trial

Mutate = Callable[[bytes, random.Random], bytes]
INTERESTING = [0, 1, 2, 3, 7, 8, 31, 32, 127, 255, 256, 65535, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63]
SECONDS = 30
LIMIT_BYTES = 2 * 2**30


def forge(artifact: Path, out: Path, changed: dict[str, bytes], **fields: Any) -> Path:
    """A copy of an artifact with other files, or other fields of the manifest, whose sums are right."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(artifact, out)
    manifest = json.loads((out / MANIFEST).read_text("utf-8"))
    for name, data in changed.items():
        (out / name).write_bytes(data)
        manifest["files"][name] = hashlib.sha256(data).hexdigest()
        details = manifest["details"] or {}
        if name == manifest["main_file"] and "head_bytes" in details:
            head = min(details["head_bytes"], len(data))
            details |= {"file_bytes": len(data), "head_bytes": head}
            details["head_sha256"] = hashlib.sha256(data[:head]).hexdigest()
        if name.endswith(".data"):
            details["data_bytes"] = len(data)
    (out / MANIFEST).write_text(json.dumps(manifest | fields))
    return out


# --- mutations --------------------------------------------------------------------------------------------------------


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, blank, repeat, or put a number somewhere."""
    out, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(6):
        case 0 | 1:
            for _ in range(rng.choice([1, 1, 2, 8])):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 2:
            del out[at:]
        case 3:
            out[at : at + rng.choice([1, 4, 64])] = bytes(4)
        case 4:
            out[at:at] = out[at : at + 64]
        case 5:
            _put(out, at & ~3, 8, rng)
    return bytes(out)


def head_bytes(data: bytes, rng: random.Random) -> bytes:
    """``any_bytes`` in the first part, where formats keep what they parse."""
    cut = max(64, min(len(data), 8192))
    return any_bytes(data[:cut], rng) + data[cut:]


def gguf(data: bytes, rng: random.Random) -> bytes:
    """A value, count, type, length or offset of the header."""
    places = list(_gguf_places(data))
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2])):
        wanted = rng.choice([4, 4, 8])  # values and types, which are read, before lengths, which end the reading
        at, size = rng.choice([place for place in places if place[1] == wanted])
        _put(out, at, size, rng)
    return bytes(out)


def proto(message: type[Any]) -> Mutate:
    """A field, anywhere in a protobuf message: another value, gone, or twice."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        whole = message()
        whole.ParseFromString(data)
        fields = [(owner, field) for owner in _messages(whole) for field, _ in owner.ListFields()]
        for _ in range(rng.choice([1, 1, 1, 2])):
            with contextlib.suppress(ValueError, TypeError):  # a number that the field cannot hold
                _change(*rng.choice(fields), rng)
        return whole.SerializeToString()

    return mutate


def _change(owner: Any, field: Any, rng: random.Random) -> None:
    value = getattr(owner, field.name)
    repeated = hasattr(value, "extend")
    if rng.random() < 0.1 or (field.message_type and not repeated) or isinstance(value, Mapping):
        owner.ClearField(field.name)
    elif field.message_type:
        at = rng.randrange(len(value))
        value.extend([value[at]]) if rng.random() < 0.5 else value.pop(at)
    elif repeated:
        at = rng.randrange(len(value))
        value[at] = _other(value[at], rng)
        if rng.random() < 0.2:
            value.extend(value[:1])
    else:
        setattr(owner, field.name, _other(value, rng))


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, str):
        return rng.choice(["", "x", value + "x", value[:-1], "../x", "/etc/passwd", "Loop", "If", "Identity", "\0"])
    if isinstance(value, bytes):
        return any_bytes(value, rng) if value else b"x"
    if isinstance(value, float):
        return rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e38, -value])
    return rng.choice([*INTERESTING, -1, -(2**31), value + 1, value - 1])


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        one_message = hasattr(value, "DESCRIPTOR")
        inner = value.values() if isinstance(value, Mapping) else [value] if one_message else value
        for one in inner:
            if hasattr(one, "DESCRIPTOR"):
                yield from _messages(one)


def _put(out: bytearray, at: int, size: int, rng: random.Random) -> None:
    number = rng.choice([*INTERESTING, rng.getrandbits(64), -1])
    new = (
        struct.pack("<d" if size == 8 else "<f", rng.choice([-1, float("nan"), 1e38])) if not rng.randrange(6) else b""
    )
    out[at : at + size] = (new or (number % 2**64).to_bytes(8, "little"))[:size]


_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _gguf_places(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the header's numbers stand, and their sizes."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little")

    def value(at: int, kind: int) -> Iterator[tuple[int, int]]:
        if kind == 8:
            yield at, 8
            if length := number(at, 8):
                yield at + 8, min(length, 8)
        elif kind == 9:
            inner, count = number(at, 4), number(at + 4, 8)
            yield from ((at, 4), (at + 4, 8))
            at += 12
            for i in range(count):
                if i < 3:
                    yield from value(at, inner)
                at += size_of(at, inner)
        else:
            yield at, _GGUF_SIZES[kind]

    def size_of(at: int, kind: int) -> int:
        if kind == 8:
            return 8 + number(at, 8)
        if kind == 9:
            inner, end = number(at, 4), at + 12
            for _ in range(number(at + 4, 8)):
                end += size_of(end, inner)
            return end - at
        return _GGUF_SIZES[kind]

    yield from ((4, 4), (8, 8), (16, 8))
    at = 24
    for _ in range(number(16, 8)):
        key = 8 + number(at, 8)
        yield at, 8
        yield at + key - 4, 4
        kind = number(at + key, 4)
        yield at + key, 4
        yield from value(at + key + 4, kind)
        at += key + 4 + size_of(at + key + 4, kind)
    for _ in range(number(8, 8)):
        name = 8 + number(at, 8)
        dims = number(at + name, 4)
        yield from ((at, 8), (at + name - 4, 4), (at + name, 4))
        at += name + 4
        yield from ((at + 8 * i, 8) for i in range(dims))
        yield from ((at + 8 * dims, 4), (at + 8 * dims + 4, 8))
        at += 8 * dims + 12


def targets_of(artifact: Path) -> list[tuple[str, Mutate]]:
    """The files of an artifact that a runtime parses, and how to damage each."""
    manifest = load_artifact(artifact, check_files=False).manifest
    match manifest.target:
        case "gguf":
            return [("model.gguf", gguf), ("model.gguf", gguf), ("model.gguf", head_bytes), ("model.gguf", any_bytes)]
        case "onnx":
            import onnx

            graph = proto(onnx.ModelProto)
            return [
                ("model.onnx", graph),
                ("head.onnx", graph),
                ("model.onnx", any_bytes),
                ("model.onnx_data", any_bytes),
            ]
        case "executorch":
            return [("model.pte", any_bytes), ("model.pte", head_bytes)]
    from edgekd.targets.coreml.mil.package import proto as module

    folder = "model.mlpackage"
    (model,) = [name for name in manifest.files if name.endswith(".mlmodel")]
    (weights,) = [name for name in manifest.files if name.endswith(".bin")]
    program = proto(module("Model_pb2").Model)
    return [(model, program), (model, any_bytes), (weights, any_bytes), (f"{folder}/Manifest.json", any_bytes)]


# --- running ----------------------------------------------------------------------------------------------------------


def preload(target: str) -> None:
    """Import a runtime, so that forks need not."""
    from importlib import import_module

    import_module({"coreml": "edgekd.targets.coreml.mil"}.get(target, f"edgekd.targets.{target}.session"))
    if target in ("gguf", "onnx", "executorch"):
        import_module(f"edgekd.targets.{target}.session").runtime()
    if target == "onnx":
        import onnx  # noqa: F401
    load_target(target)


def as_caller(folder: Path) -> None:
    """What a program does with an artifact that has passed."""
    artifact = load_artifact(folder)
    session = load_target(artifact.manifest.target).open(artifact, threads=1)
    session.tokenize("def f(x):\n    return x")
    list(session.generate([1, 2, 3], 4))
    session.close()


def in_fork(work: Callable[[Path], None], folder: Path, limit: int | None) -> tuple[str, int]:
    """How the work ends in a forked process, ``passes``, ``refused: ...`` (our error), ``exception: ...``,
    ``signal: ...``, ``hangs``, and its most resident bytes."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        _fork(work, folder, limit, write)
    os.close(write)
    ended, _, _ = select.select([read], [], [], SECONDS)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    said = os.read(read, 65536).decode("utf-8", "replace")
    os.close(read)
    _, status, usage = os.wait4(pid, 0)
    if not ended:
        said = "hangs"
    elif os.WIFSIGNALED(status):
        said = f"signal: {signal.Signals(os.WTERMSIG(status)).name}"
    return said or f"exit: {os.waitstatus_to_exitcode(status)}", usage.ru_maxrss * 1024


def _fork(work: Callable[[Path], None], folder: Path, limit: int | None, write: int) -> None:
    said = "passes"
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        if limit:
            trial._limit(limit)
        work(folder)
    except EdgekdError as error:
        said = f"refused: {type(error).__name__}: {error}"
    except BaseException as error:
        said = f"exception: {type(error).__name__}: {error}"
    os.write(write, said.encode("utf-8", "replace")[:4000])
    os._exit(0)


def outcomes(artifact: Path, folder: Path) -> Iterator[tuple[str, str, int]]:
    """How an artifact's trial ends, and a caller's use of it after one that passes: who, how, most resident bytes."""
    how, resident = in_fork(run_trial, artifact, LIMIT_BYTES)
    yield "trial", how, resident
    if how == "passes":
        yield "caller", *in_fork(as_caller, artifact, None)
    if outside := sorted({*os.listdir(folder)} - {artifact.name}):
        yield "caller", f"wrote {outside}", 0


def run(artifact: Path, count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Open mutants of an artifact.

    Returns:
        Outcomes of the trial and of callers, counted; and what must not be: a caller's exception, death or hang, more
        than 1 GiB, or a file outside.
    """
    places, counts, wrong = targets_of(artifact), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            file, mutate = rng.choice(places)
            mutant = forge(artifact, Path(name) / "work", {file: mutate((artifact / file).read_bytes(), rng)})
            for who, how, resident in outcomes(mutant, Path(name)):
                counts[f"{who} {_kind(how)}"] += 1
                if who == "caller" and (not how.startswith(("passes", "refused")) or resident > 2**30):
                    wrong.append(f"{number}: {file}: {how}, {resident / 1e6:.0f} MB")
    return counts, wrong


def _kind(how: str) -> str:
    return " ".join(how.split(": ")[: 2 if how.startswith(("signal", "exception", "exit")) else 1])


def main() -> int:
    """Run by hand, and by the tests: in a process without threads, which may fork."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", type=Path, nargs="+", help="of one target")
    parser.add_argument("--count", type=int, default=1000, help="mutants of the first; 0 opens all as they are")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    first = options.artifacts[0]
    preload(json.loads((first / MANIFEST).read_text("utf-8"))["target"])
    if not options.count:
        ends = {path.name: in_fork(run_trial, path, LIMIT_BYTES)[0] for path in options.artifacts}
        print(json.dumps(ends))
        return 0
    counts, wrong = run(first, options.count, options.seed)
    print(json.dumps({"counts": dict(sorted(counts.items())), "wrong": wrong}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

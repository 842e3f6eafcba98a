"""``edgekd serve`` beside a session of the same artifact: what HTTP costs, in turns on one machine.

    python -m edgekd.benchmarks.peers.serving ARTIFACT

The server runs in a process of its own, as users start it, and is asked by a plain HTTP client in this one, with a
seed, so that it keeps no part of a prompt. Time to first token runs, for the session, from the ids in hand to the first
token chosen; for the server, from the request sent to the first text read, with the template and the tokenizer between.
Rates are of the tokens behind the first. Prints a line for each figure, then one line of JSON with every sample.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from ...conversation import chat_ids, render_chat, text_ids
from ...files import Json
from ...generation import Generator, Sampling
from ...manifest import Contract, load_artifact
from ...session import Session
from ...targets import open_artifact
from ...targets.shared.artifact import cores
from ..harness import describe_machine
from ..metrics import median

_TEXT = "Tell me a long story about a lighthouse, its keeper, and the ships that pass at night."


class Sample(NamedTuple):
    """One answer."""

    ttft_s: float
    tokens_per_s: float
    tokens: int


@contextmanager
def server(artifact: Path, threads: int) -> Iterator[tuple[str, str]]:
    """A server's address and its model's name."""
    command = [sys.executable, "-c", "from edgekd.cli import main; main()", "serve", str(artifact), "--port", "0"]
    process = subprocess.Popen([*command, "--threads", str(threads)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        name, _, rest = process.stderr.readline().partition(": http://")
        if not rest:
            raise typer.BadParameter(f"the server does not start: {process.stderr.read()}")
        yield rest.split()[0], name
    finally:
        process.terminate()
        process.wait()


def ask_server(address: str, body: Json, path: str) -> Sample:
    """One streamed answer over a connection of its own."""
    connection = http.client.HTTPConnection(address)
    connection.connect()
    data, first, last = json.dumps(body), 0.0, 0.0
    usage: dict[str, int] = {}
    start = time.perf_counter()
    connection.request("POST", path, data, {"content-type": "application/json"})
    answer = connection.getresponse()
    while line := answer.readline():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        usage = chunk.get("usage") or usage
        if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in chunk["choices"]):
            last = time.perf_counter()
            first = first or last
    connection.close()
    count = usage["completion_tokens"]
    return Sample(first - start, (count - 1) / (last - first), count)


def ask_session(generator: Generator, ids: list[int], decode: int) -> Sample:
    """One answer of the session itself."""
    start = time.perf_counter()
    first, count = 0.0, 0
    for piece in generator.answer(ids, Sampling(decode), keep=False):
        if piece.ending is None:
            last = time.perf_counter()
            first, count = first or last, count + 1
    return Sample(first - start, (count - 1) / (last - first), count)


def _question(session: Session, contract: Contract, decode: int) -> tuple[list[int], Json, str]:
    """Ids of the prompt, and the request that means the same."""
    shared: Json = {"temperature": 0, "seed": 0, "max_tokens": decode, "stream": True}
    shared["stream_options"] = {"include_usage": True}
    if contract.chat_template is None or contract.special_ids is None:
        return text_ids(session, contract, _TEXT), {**shared, "prompt": _TEXT}, "/v1/completions"
    messages = [{"role": "user", "content": _TEXT}]
    ids = chat_ids(session, contract, render_chat(contract.chat_template, messages, contract.special_tokens))
    return ids, {**shared, "messages": messages}, "/v1/chat/completions"


def main(
    artifact: Annotated[Path, typer.Argument(help="An artifact of any target.")],
    decode: int = 128,
    runs: int = 10,
    threads: int = cores(),
) -> None:
    """Measure both in turns and print what is between the medians."""
    loaded = load_artifact(artifact)
    contract, machine = loaded.manifest.contract, describe_machine()
    session = open_artifact(loaded, threads=threads)
    generator = Generator(session, contract.eos_ids)
    ids, body, path = _question(session, contract, decode)
    samples: dict[str, list[Sample]] = {"session": [], "server": []}
    with server(artifact, threads) as (address, model):
        for run in range(-1, runs):  # the first is not counted
            ours, theirs = ask_session(generator, ids, decode), ask_server(address, {**body, "model": model}, path)
            if run >= 0:
                samples["session"].append(ours)
                samples["server"].append(theirs)
    session.close()
    plain = {name: {key: [getattr(s, key) for s in found] for key in Sample._fields} for name, found in samples.items()}
    ttft = {name: median(found["ttft_s"]) for name, found in plain.items()}
    rate = {name: median(found["tokens_per_s"]) for name, found in plain.items()}
    figures = {"ttft_overhead_s": ttft["server"] - ttft["session"], "rate_ratio": rate["server"] / rate["session"]}
    typer.echo(f"TTFT: session {ttft['session'] * 1e3:.1f} ms, server {1e3 * figures['ttft_overhead_s']:+.1f} ms")
    typer.echo(f"decode: session {rate['session']:,.1f} tok/s, server {figures['rate_ratio']:.3f} of it")
    settings = {"artifact": str(artifact), "prompt": len(ids), "decode": decode, "threads": threads, "runs": runs}
    told = {"settings": settings, "machine": machine.model_dump(), "figures": figures, "samples": plain}
    typer.echo(json.dumps(told))


if __name__ == "__main__":
    typer.run(main)

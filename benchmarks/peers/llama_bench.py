"""edgekd's session beside llama-bench: the same GGUF file, threads and depth, in turns.

    make llama-bench    # builds it from llama-cpp-python's own source archive
    python -m edgekd.benchmarks.peers.llama_bench ARTIFACT --llama-bench build/llama.cpp/bin/llama-bench

Prints a line for each speed, then one line of JSON with every sample.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from ...manifest import Artifact, load_artifact
from ...spec import BenchSpec
from ...targets import open_artifact, try_artifact
from ...targets.shared.artifact import cores
from ..harness import ONE_RUN, bench
from ..metrics import median


def llama_bench(program: Path, artifact: Artifact, *, prompt: int, decode: int, threads: int) -> dict[str, float]:
    """Tokens/s of llama-bench: prefill of ``prompt`` tokens, and decode of ``decode`` tokens behind them."""
    shared = [program, "-m", artifact.main_file, "-t", threads, "-r", 1, "-fa", 1, "-o", "json"]
    prefill = [*shared, "-p", prompt, "-n", 0]
    generate = [*shared, "-p", 0, "-n", decode, "-d", prompt]
    speeds = {}
    for name, command in (("prefill", prefill), ("decode", generate)):
        try:
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "").strip() or error
            raise typer.BadParameter(f"{program} does not run: {said}. Build it with: make llama-bench") from error
        speeds[name] = json.loads(done.stdout)[0]["avg_ts"]
    return speeds


def main(
    artifact: Annotated[Path, typer.Argument(help="An artifact of the gguf target.")],
    program: Annotated[Path, typer.Option("--llama-bench", help="The program, built with the flags of this CPU.")],
    prompt: int = 256,
    decode: int = 64,
    runs: int = 5,
    threads: int = cores(),
) -> None:
    """Measure both in turns and print the ratios of the medians."""
    loaded = load_artifact(artifact)
    try_artifact(loaded)  # here, not in the processes that are timed
    spec = BenchSpec(prompt_tokens=[prompt], decode_tokens=decode, threads=threads, **ONE_RUN)
    samples: dict[str, dict[str, list[float]]] = {
        "edgekd": {"prefill": [], "decode": [], "decode and sampling": []},
        "llama-bench": {"prefill": [], "decode": []},
    }
    for _ in range(runs):
        ours = bench(open_artifact, loaded, spec)
        samples["edgekd"]["prefill"] += ours.prefill_tokens_per_s[str(prompt)].samples
        sampling_s = sum(ours.sampling_s.samples)
        (rate,) = ours.decode_tokens_per_s.samples
        samples["edgekd"]["decode"].append(decode / (decode / rate - sampling_s))
        samples["edgekd"]["decode and sampling"] += ours.decode_tokens_per_s.samples
        theirs = llama_bench(program, loaded, prompt=prompt, decode=decode, threads=threads)
        for what, speed in theirs.items():
            samples["llama-bench"][what].append(speed)
    ratios = {}
    for what, speeds in samples["edgekd"].items():
        # llama-bench reads no logits: it feeds random tokens.
        ours_median, theirs_median = median(speeds), median(samples["llama-bench"][what.split()[0]])
        ratios[what] = ours_median / theirs_median
        typer.echo(
            f"{what}: edgekd {ours_median:,.0f} tok/s, llama-bench {theirs_median:,.0f} tok/s, "
            f"ratio {ratios[what]:.3f} (medians of {runs})"
        )
    settings = {"artifact": str(artifact), "prompt": prompt, "decode": decode, "threads": threads}
    typer.echo(json.dumps({"settings": settings, "ratios": ratios, "samples": samples}))


if __name__ == "__main__":
    typer.run(main)

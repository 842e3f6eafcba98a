"""Artifacts beside what other programs make of the same student: in turns, in fresh processes, by one stopwatch.

    python -m onnxruntime_genai.models.builder -i STUDENT -o BUILDER -p int4 -e cpu -c CACHE \\
        --extra_options int4_accuracy_level=4
    python -m executorch.extension.llm.export.export_llm base.model_class=llama3 base.params=PARAMS.json \\
        base.checkpoint=STUDENT.pth model.dtype_override=fp32 \\
        model.use_kv_cache=True model.use_sdpa_with_kv_cache=True \\
        export.max_seq_length=512 export.max_context_length=1024 export.output_name=PROGRAM.pte \\
        quantization.qmode=8da4w quantization.group_size=32 quantization.embedding_quantize="'8,0'" \\
        backend.xnnpack.enabled=True backend.xnnpack.extended_ops=True
    python -m edgekd.benchmarks.peers.side_by_side ARTIFACT... \\
        --genai BUILDER --transformers STUDENT --pte PROGRAM.pte --prompt 256

Prints a table, every speed as a ratio to the first artifact's, then one line of JSON with every sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ...manifest import Artifact, load_artifact
from ...proof import Benchmark, Figure
from ...spec import BenchSpec
from ...targets import open_artifact, try_artifact
from ...targets.executorch.session import execute, runner_tokenizer, runtime, set_threads
from ...targets.onnx.session import genai_tokenizer
from ...targets.shared.artifact import cores
from ..harness import ONE_RUN, bench
from ..metrics import median


class _Peer:
    """What the benchmark asks of a session, but for prefill and reset."""

    prefill: Callable[[Sequence[int]], np.ndarray]
    tokenize: Callable[[str], Sequence[int]]

    def __init__(self, artifact: Artifact) -> None:
        self.vocab_size = artifact.manifest.contract.vocab_size

    def token_bytes(self, token: int) -> bytes:
        return b"x"  # any id stands for text

    def decode(self, token: int) -> np.ndarray:
        return self.prefill([token])

    def close(self) -> None:
        return None


class Genai(_Peer):
    """A folder of onnxruntime-genai in its own generator."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        import onnxruntime_genai

        super().__init__(artifact)
        config = onnxruntime_genai.Config(str(artifact.folder))
        options = {"session_options": {"intra_op_num_threads": threads, "log_severity_level": 3}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        model = onnxruntime_genai.Model(config)
        self.tokenize = genai_tokenizer(artifact.folder)
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=artifact.manifest.contract.context_length, do_sample=False)
        self._generator = onnxruntime_genai.Generator(model, params)

    def reset(self) -> None:
        self._generator.rewind_to(0)

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        self._generator.append_tokens(np.asarray(ids, np.int32))
        return self._generator.get_logits()[0, -1]


class Transformers(_Peer):
    """A model folder in transformers, bfloat16: the calls of its ``generate``, without its loop's overhead."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(artifact)
        if threads:
            torch.set_num_threads(threads)
        self._torch = torch
        self.tokenize = AutoTokenizer.from_pretrained(artifact.folder).encode
        self._model = AutoModelForCausalLM.from_pretrained(artifact.folder, dtype=torch.bfloat16)
        self.reset()

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        with self._torch.inference_mode():
            fed = self._torch.tensor([list(ids)])
            logits = self._model(fed, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1].float().numpy()


class Program(_Peer):
    """A program of ExecuTorch's export_llm in ExecuTorch's runtime."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        super().__init__(artifact)
        lib = runtime()
        set_threads(cores(threads))
        self._used = 0
        self.tokenize = runner_tokenizer(artifact.folder.with_name("tokenizer.json"), artifact.manifest.contract)
        self._program = lib.load_program(artifact.folder)
        self._forward = self._program.load_method("forward")

    def reset(self) -> None:
        self._used = 0

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        logits = execute(self._forward, ids, self._used)
        self._used += len(ids)
        return logits.reshape(-1, self.vocab_size)[-1].numpy()


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(_size_bytes(inner) for inner in path.iterdir())


@dataclass(frozen=True)
class _Merged:
    """A figure of one contender over all turns."""

    median: float
    samples: Sequence[float]


@dataclass(frozen=True)
class _Contender:
    """What one contender reached; times to first token by the prompt's length."""

    size_bytes: int
    ttft_s: Mapping[str, _Merged]
    decode_tokens_per_s: _Merged
    peak_rss_bytes: _Merged
    load_s: _Merged


def _merged(figures: Iterable[Figure]) -> _Merged:
    samples = [sample for figure in figures for sample in figure.samples]
    return _Merged(median(samples), samples)


def _contender(turns: Sequence[Benchmark], size_bytes: int) -> _Contender:
    return _Contender(
        size_bytes,
        {length: _merged(turn.ttft_s[length] for turn in turns) for length in turns[0].ttft_s},
        _merged(turn.decode_tokens_per_s for turn in turns),
        _merged(turn.peak_rss_bytes for turn in turns),
        _merged(turn.load_s for turn in turns),
    )


def _line(name: str, one: _Contender, first: _Contender) -> str:
    """Medians, every speed as a ratio to the first contender's."""
    words = [f"{one.size_bytes / 1e6:.1f} MB"]
    for length, ours in first.ttft_s.items():
        theirs = one.ttft_s[length].median
        words.append(f"TTFT at {length} tokens {theirs * 1e3:.1f} ms ({ours.median / theirs:.2f} x)")
    rate, best = one.decode_tokens_per_s.median, first.decode_tokens_per_s.median
    words.append(f"decode {rate:,.1f} tok/s ({rate / best:.2f} x)")
    words.append(f"peak {one.peak_rss_bytes.median / 1e6:,.0f} MB")
    return f"{name}: {', '.join(words)}"


def main(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts of any target; the first is what ratios are to.")],
    genai: Annotated[list[Path] | None, typer.Option(help="A folder that onnxruntime-genai runs.")] = None,
    transformers: Annotated[list[Path] | None, typer.Option(help="A model folder.")] = None,
    pte: Annotated[list[Path] | None, typer.Option(help="A program of export_llm beside its tokenizer.json.")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Prompt lengths in tokens.")] = None,
    decode: int = 64,
    runs: int = 5,
    threads: int = cores(),
) -> None:
    """Measure all in turns and print a table."""
    loaded = [load_artifact(folder) for folder in artifacts]
    for artifact in loaded:
        try_artifact(artifact)  # here, not in the processes that are timed
    contenders: list[tuple[str, Any, Artifact]] = [(a.folder.name, open_artifact, a) for a in loaded]
    peers = (("genai", Genai, genai), ("transformers", Transformers, transformers), ("export_llm", Program, pte))
    for name, opener, paths in peers:
        contenders += [(f"{name} {path.name}", opener, Artifact(path, loaded[0].manifest)) for path in paths or []]
    spec = BenchSpec(prompt_tokens=prompt or [128, 896], decode_tokens=decode, threads=threads, **ONE_RUN)
    turns: dict[str, list[Benchmark]] = {name: [] for name, _, _ in contenders}
    for _ in range(runs):
        for name, opener, artifact in contenders:
            turns[name].append(bench(opener, artifact, spec))
    rows = {name: _contender(turns[name], _size_bytes(artifact.folder)) for name, _, artifact in contenders}
    first = rows[contenders[0][0]]
    for name, row in rows.items():
        typer.echo(_line(name, row, first))
    settings = {"decode_tokens": decode, "runs": runs, "threads": threads}
    machine = turns[contenders[0][0]][0].machine.model_dump()
    told = {name: asdict(row) for name, row in rows.items()}
    typer.echo(json.dumps({"settings": settings, "machine": machine, "rows": told}))


if __name__ == "__main__":
    typer.run(main)

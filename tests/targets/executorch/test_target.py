"""The ExecuTorch target against transformers in fp32, on two-layer random models, through ExecuTorch's own runtime."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("executorch")

from artifacts import forge

from cases import (
    IDS,
    LLAMA3_ROPE,
    export_to,
    held,
    mean_kl,
    reference,
    spec_of,
)
from edgekd import targets
from edgekd.checkpoint import Checkpoint
from edgekd.errors import BadArtifact, EdgekdError, SpecError
from edgekd.manifest import Artifact, load_artifact
from edgekd.quant.quantize import quantize
from edgekd.quant.store.reader import open_quantized
from edgekd.session import Session
from edgekd.student import load_model
from edgekd.targets import load_recipe
from edgekd.targets.executorch import lower as _executorch_lower
from edgekd.targets.executorch import session as session_
from edgekd.targets.shared.tokenizer import JsonTokenizer

CASES = {
    "llama tied": ("llama", {}, "fp16"),
    "llama untied, 3.1 rope": ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE}, "fp16"),
    "qwen2": ("qwen2", {"head_dim": 16}, "fp16"),
    "qwen3": ("qwen3", {"head_dim": 128}, "fp16"),
    "llama fp32": ("llama", {"tie_word_embeddings": False}, "executorch-fp32"),
    "qwen2 fp32": ("qwen2", {"head_dim": 16}, "executorch-fp32"),
    "qwen3 fp32": ("qwen3", {"head_dim": 128}, "executorch-fp32"),
    "llama untied int4": ("llama", {"tie_word_embeddings": False}, "portable-int4"),
    "qwen2 int4": ("qwen2", {"head_dim": 16}, "portable-int4"),
    "qwen3 head4": ("qwen3", {}, "portable-int4-head4"),
    "qwen3 odd width": ("qwen3", {"intermediate_size": 80, "hidden_size": 72, "head_dim": 32}, "int8"),
}
FAST = ("llama tied", "qwen2 int4")

spec, export = partial(spec_of, "executorch"), partial(export_to, "executorch")


def make_case(name: str, folder: Path, student_factory: Any) -> tuple[Artifact, Path, Path | None]:
    """Artifact, student and quantized student of a case."""
    kind, settings, recipe = CASES[name]
    student = student_factory(folder / "student", kind, **settings)  # weights are exact in fp16
    packed = None
    if recipe == "executorch-fp32":
        weights = load_file(student / "model.safetensors")
        weights = {name: value.float() * (1 + 2**-14) for name, value in weights.items()}
        assert not torch.equal(weights["model.norm.weight"].half().float(), weights["model.norm.weight"])
        save_file(weights, student / "model.safetensors", {"format": "pt"})
    elif recipe != "fp16":
        packed = folder / "quantized"
        quantize(student, packed, load_recipe(recipe))
    return export(student, recipe, folder / "out", packed), student, packed


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, student_factory: Any
) -> dict[str, tuple[Artifact, Path, Path | None]]:
    """The artifacts that many tests look at: an export takes seconds."""
    return {name: make_case(name, tmp_path_factory.mktemp("case"), student_factory) for name in FAST}


@pytest.fixture
def session(made: Any) -> Iterator[Session]:
    session = targets.open_artifact(made["llama tied"][0], threads=1)
    yield session
    session.close()


def check_case(artifact: Artifact, student: Path, packed: Path | None) -> None:
    session = targets.open_artifact(artifact, threads=1)
    actual = session.prefill(IDS, all_logits=True)
    session.close()
    expected = reference(student, IDS, packed)
    assert actual.shape == (200, 700) and actual.dtype == np.float32
    if packed is None:  # the order of sums alone differs
        assert np.abs(expected - actual).max() < 1e-4 and (expected.argmax(-1) == actual.argmax(-1)).all()
        bits = 16 if artifact.manifest.recipe == "fp16" else 32
        assert bits <= artifact.manifest.bits_per_weight < bits + 2.5  # rows of 1 / E and half turns are constants too
    else:  # and activations are int8
        assert artifact.manifest.bits_per_weight < 13
        assert 1e-6 < mean_kl(expected, actual) < 0.01
        assert mean_kl(reference(student, IDS), actual) > mean_kl(expected, actual) / 2
    assert artifact.manifest.details["undelegated_heavy"] == []


@pytest.mark.parametrize("name", FAST)
def test_logits_are_the_models(name: str, made: Any) -> None:
    check_case(*made[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_logits_are_the_models_of_every_architecture(name: str, tmp_path: Path, student_factory: Any) -> None:
    artifact, student, packed = make_case(name, tmp_path, student_factory)
    check_case(artifact, student, packed)
    if packed is not None:
        check_bits(artifact, packed)


class Flatbuffer:
    """A flatbuffer read by the format's own rules, without a schema's code: tables by field number."""

    def __init__(self, data: bytes, at: int | None = None) -> None:
        self.data = data
        self.at = self._u32(0) if at is None else at

    def _u32(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 4], "little")

    def place(self, field: int) -> int:
        """Where a field lies; 0 where it is absent."""
        table = self.at - int.from_bytes(self.data[self.at : self.at + 4], "little", signed=True)
        size = int.from_bytes(self.data[table : table + 2], "little")
        entry = 4 + 2 * field
        offset = int.from_bytes(self.data[table + entry : table + entry + 2], "little") if entry < size else 0
        return self.at + offset if offset else 0

    def number(self, field: int, size: int = 4) -> int:
        place = self.place(field)
        return int.from_bytes(self.data[place : place + size], "little") if place else 0

    def table(self, field: int) -> Flatbuffer:
        place = self.place(field)
        return Flatbuffer(self.data, place + self._u32(place))

    def text(self, field: int) -> str:
        place = self.place(field)
        start = place + self._u32(place)
        return self.data[start + 4 : start + 4 + self._u32(start)].decode()

    def vector(self, field: int) -> list[int]:
        """Places of a vector's 4-byte elements."""
        place = self.place(field)
        if not place:
            return []
        start = place + self._u32(place)
        return [start + 4 + 4 * i for i in range(self._u32(start))]

    def tables(self, field: int) -> list[Flatbuffer]:
        return [Flatbuffer(self.data, at + self._u32(at)) for at in self.vector(field)]


def read_program(artifact: Artifact) -> tuple[list[dict[str, Any]], dict[str, bytes], list[bytes]]:
    """What a .pte holds, by schema/program.fbs and XNNPACK's schema.fbs: matrices of the XNNPACK graphs of ``forward``
    in order, named tensors, and constants."""
    data = artifact.main_file.read_bytes()
    assert data[4:8] == b"ET12" and data[8:12] == b"eh00"
    base = int.from_bytes(data[24:32], "little")
    program = Flatbuffer(data)
    segments = [data[base + t.number(0, 8) :][: t.number(1, 8)] for t in program.tables(4)]
    named = {entry.text(0): segments[entry.number(1)] for entry in program.tables(7)}
    constant = program.table(5)
    place = constant.place(1)
    start = place + int.from_bytes(data[place : place + 4], "little")
    count = int.from_bytes(data[start : start + 4], "little")
    first = start + 4
    offsets = [int.from_bytes(data[first + 8 * i : first + 8 * i + 8], "little") for i in range(count)]
    whole = segments[constant.number(0)]
    constants = [whole[a:b] for a, b in zip(offsets, [*offsets[1:], len(whole)], strict=True)]
    (forward,) = (plan for plan in program.tables(1) if plan.text(0) == "forward")
    matrices: list[dict[str, Any]] = []
    for delegate in forward.tables(7):
        assert delegate.text(0) == "XnnpackBackend"
        blob = segments[delegate.table(1).number(1)]
        assert blob[4:8] == b"XH00"
        offset, size = (int.from_bytes(blob[at : at + 4], "little") for at in (10, 14))
        matrices += xnnpack_matrices(Flatbuffer(blob[offset : offset + size]))
    return matrices, named, constants


def xnnpack_matrices(graph: Flatbuffer) -> list[dict[str, Any]]:
    """Datatype, shape and keys of the weights of every fully connected node, in order."""
    keys = [entry.text(2) if entry.place(2) else "" for entry in graph.tables(8)]
    values = graph.tables(2)
    found = []
    for node in graph.tables(1):
        if node.number(0, 1) != 2:  # XNNFullyConnected, the second of the union
            continue
        value = values[node.table(1).number(1)]
        quantized = value.number(0, 1) == 2  # XNNQuantizedTensorValue
        tensor = value.table(1).table(0) if quantized else value.table(1)
        shape = [int.from_bytes(graph.data[at : at + 4], "little") for at in tensor.vector(2)]
        found.append({"datatype": tensor.number(0, 2), "shape": shape, "q": keys[tensor.number(3)]})
        if quantized:
            params = value.table(1).table(2)
            grouped = value.table(1).number(1, 1) == 4  # PerChannelGroupQuant
            found[-1] |= {
                "group": params.number(2) if grouped else None,
                "scale": keys[params.number(4 if grouped else 2)],
            }
    return found


def check_bits(artifact: Artifact, folder: Path) -> None:
    """Compare integers and scales of every matrix with the quantized student's."""
    packed = open_quantized(folder)
    matrices, named, constants = read_program(artifact)
    order = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    embedding = "model.embed_tokens.weight"
    names = [f"model.layers.{n}.{p}.weight" for n in range(2) for p in order]
    names.append(embedding if packed.tied else "lm_head.weight")
    quantized = [m for m in matrices if "scale" in m]
    assert len(quantized) == len(names)
    for name, found in zip(names, quantized, strict=True):
        q, scale = held(packed, name)
        assert found["shape"] == list(q.shape), name
        codes = np.frombuffer(named[found["q"]], np.uint8)
        if packed.kinds[name] == "int4":
            assert found["group"] == 32
            codes = (np.stack([codes & 15, codes >> 4], -1).reshape(q.shape).astype(np.int8)) - 8
            bits = np.frombuffer(named[found["scale"]], np.uint16).astype(np.uint32) << 16  # bfloat16
            scales = bits.view(np.float32)
        else:
            codes = codes.view(np.int8).reshape(q.shape)
            scales = np.frombuffer(named[found["scale"]], np.float32)
        assert np.array_equal(codes, q) and np.array_equal(scales.reshape(scale.shape), scale), name
    q, scale = held(packed, embedding)
    rows = 2 * q.nbytes // 4 if packed.kinds[embedding] == "int4" else q.nbytes
    (at,) = (
        i for i, c in enumerate(constants) if len(c) >= rows and is_embedding(c[:rows], q, packed.kinds[embedding])
    )
    near = [np.frombuffer(c[: 2 * scale.size], np.float16) for c in constants[at - 1 : at + 2]]
    assert any(np.array_equal(c.astype(np.float32), scale.ravel()) for c in near)


def is_embedding(data: bytes, q: np.ndarray, kind: str) -> bool:
    codes = np.frombuffer(data, np.uint8)
    if kind == "int4":  # the first code is the high one
        return np.array_equal(np.stack([codes >> 4, codes & 15], -1).reshape(q.shape).astype(np.int8) - 8, q)
    return np.array_equal(codes.view(np.int8).reshape(q.shape), q)


def test_the_file_holds_the_integers_bit_for_bit(made: Any) -> None:
    artifact, _, packed = made["qwen2 int4"]
    assert artifact.manifest.grid_digest == open_quantized(packed).digest
    check_bits(artifact, packed)


def test_shared_bytes_are_stored_once(made: Any) -> None:
    artifact, _, packed = made["qwen2 int4"]
    q = open_quantized(packed).integers("model.embed_tokens.weight")[0].numpy().tobytes()
    data = artifact.main_file.read_bytes()
    assert data.count(q[:4096]) == 1  # both the embedding, by its offset, and the head, by its key


def test_the_runner_of_apps_gives_the_same_tokens(tmp_path: Path, student_factory: Any) -> None:
    """ExecuTorch's own text runner, which apps embed. Its callback dies where a token ends inside a character, so the
    model says ASCII alone: every other token's row of the tied embedding is zero, and so is its logit."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    student = student_factory(tmp_path / "student", "llama", max_position_embeddings=1024)
    weights, tokens = load_file(student / "model.safetensors"), JsonTokenizer(student / "tokenizer.json", "executorch")
    for token, row in enumerate(weights["model.embed_tokens.weight"]):
        if not (text := tokens.token_bytes(token)) or not text.isascii():
            row.zero_()
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    artifact = export(student, "fp16", tmp_path / "out")
    session, model, count = targets.open_artifact(artifact, threads=1), load_model(student), 0
    with session_.silent():
        runner = TextLLMRunner(str(artifact.main_file), str(artifact.folder / "tokenizer.json"))
    prompts = [f"def f(x):\n    return x + {number}\n" for number in range(24)]
    lengths = []
    for prompt in [*prompts, "".join(prompts * 2)]:
        ids = session.tokenize(prompt)
        lengths.append(len(ids))
        ours = list(session.generate(ids, 12))
        with torch.no_grad():
            expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert ours == [token for token in expected if token not in artifact.manifest.contract.eos_ids]
        said: list[bytes] = []

        def hear(text: str, said: list[bytes] = said) -> None:
            said.append(text.encode())

        with session_.silent(), contextlib.suppress(UnicodeDecodeError):
            runner.reset()
            runner.generate(prompt, GenerationConfig(max_new_tokens=12, temperature=0.0, echo=False), hear)
        texts = b"".join(session.token_bytes(token) for token in ours)
        assert texts == b"".join(said)
        count += len(said)
    session.close()
    assert count == 25 * 12 and session_.CHUNK < lengths[-1] < 1000  # the last is fed in chunks


def test_decode_equals_prefill(session: Session) -> None:
    whole = session.prefill(IDS, all_logits=True)
    session.reset()
    session.prefill(IDS[:100])
    kept = session.decode(IDS[100])
    again = kept.copy()
    for position in range(101, 200):
        assert np.abs(session.decode(IDS[position]) - whole[position]).max() < 1e-4
    assert np.array_equal(kept, again)  # what was returned is the caller's own


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_attention_starts_no_threads_of_its_own(made: Any) -> None:
    """MKL does from two threads on, and in a pool of two each would have two more."""
    code = (
        "import os, sys; from pathlib import Path; from edgekd.targets import open_artifact\n"
        "session = open_artifact(Path(sys.argv[1]), threads=2); session.prefill([5])\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "for _ in range(3): session.reset(); session.prefill(range(5, 205))\n"
        "import torch; assert torch.get_num_threads() == 2\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, made["llama tied"][0].folder],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0\n"


def test_an_open_session_keeps_the_pool_that_it_runs_in(made: Any) -> None:
    """In a process of its own, which a pool made anew beneath a session would end."""
    code = (
        "import sys; from pathlib import Path\n"
        "from edgekd.errors import EdgekdError; from edgekd.targets import open_artifact\n"
        "one = open_artifact(Path(sys.argv[1]), threads=2); before = one.prefill(range(5, 60)).tolist()\n"
        "try: open_artifact(Path(sys.argv[1]), threads=1)\n"
        "except EdgekdError as error: print(error)\n"
        "one.reset(); print(one.prefill(range(5, 60)).tolist() == before); one.close()\n"
        "open_artifact(Path(sys.argv[1]), threads=1).prefill([5])\n"
    )
    command = [sys.executable, "-c", code, made["llama tied"][0].folder]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [
        "An ExecuTorch artifact is open in this process with 2 threads, and all share one pool. "
        "Close it before one is opened with 1, or open this one with 2.",
        "True",
    ]


@pytest.mark.skipif(session_._mkl() is None, reason="PyTorch without MKL")
def test_mkl_has_its_threads_back() -> None:
    told = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_get_max_threads
    default = session_._mkl()[2]

    def of_another_thread(what: Callable[[], int]) -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(what).result()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with session_.one_thread_a_product():
            assert told() == of_another_thread(told) == 1
            assert of_another_thread(torch.get_num_threads) == 3
        assert told() == torch.get_num_threads() == 3 and of_another_thread(told) == default
    finally:
        torch.set_num_threads(before)


def test_both_methods_share_one_cache(session: Session) -> None:
    whole = session.prefill(IDS, all_logits=True)
    session.reset()
    session.prefill(IDS[:50])
    rows = session.prefill(IDS[50:100], all_logits=True)
    last = session.prefill(IDS[100:150])
    assert np.abs(rows - whole[50:100]).max() < 1e-4 and np.abs(last - whole[149]).max() < 1e-4
    assert np.abs(session.decode(IDS[150]) - whole[150]).max() < 1e-4
    again = session.prefill(IDS[151:], all_logits=True)
    assert np.abs(again - whole[151:]).max() < 1e-4


def test_a_heavy_operator_left_behind_is_told(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XNNPACK runs all that is heavy in these models, so one that it does not run is taken for heavy."""
    monkeypatch.setattr(_executorch_lower, "_HEAVY", {"embedding", "linear"})
    with pytest.warns(UserWarning, match=r"cpu does not run aten\.embedding of this model: generation will be slow"):
        artifact = export(made["llama tied"][1], "fp16", tmp_path / "out")
    assert artifact.manifest.details["undelegated_heavy"] == ["aten.embedding"]


def test_two_exports_are_the_same_bytes(made: Any, tmp_path: Path) -> None:
    artifact, student, _ = made["qwen2 int4"]
    again = export(student, "portable-int4", tmp_path / "computed")  # and from a quantized student of its own
    assert again.manifest.files == artifact.manifest.files
    assert sorted(again.manifest.files) == [
        "chat_template.jinja",
        "model.pte",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_artifact_tells_what_it_is(made: Any) -> None:
    artifact, student, _ = made["qwen2 int4"]
    assert load_artifact(artifact.folder) == artifact
    manifest, details = artifact.manifest, artifact.manifest.details
    assert (manifest.target, manifest.recipe, manifest.main_file) == ("executorch", "portable-int4", "model.pte")
    assert manifest.student_digest == Checkpoint(student).digest
    assert set(manifest.versions) == {"edgekd", "executorch", "torch", "torchao"}
    assert details["providers"] == {"cpu": "tested"}
    assert details["delegates"] == 2 + 2  # between the attentions, and the head
    assert details["undelegated"]["llama.custom_sdpa"] == 2 and "aten.linear" not in details["undelegated"]
    assert details["delegated"]["quantized_decomposed.dequantize_per_channel_group"] == 2 * 7
    assert details["tokenizer"]["used"] in ("executorch", "tokenizers")
    program = session_.runtime().load_program(artifact.main_file)
    assert program.method_names >= {"forward", "all_logits", "get_eos_ids"}
    told = {
        name: program.load_method(name).execute([]) for name in program.method_names if name.startswith(("get", "use"))
    }
    assert told["get_max_context_len"] == told["get_max_seq_len"] == [256] and told["get_n_layers"] == [2]
    assert told["get_eos_ids"] == manifest.contract.eos_ids and told["get_vocab_size"] == [700]


def test_a_damaged_artifact_is_refused(made: Any, tmp_path: Path) -> None:
    import shutil

    artifact = Artifact(tmp_path / "copy", made["qwen2 int4"][0].manifest)
    shutil.copytree(made["qwen2 int4"][0].folder, artifact.folder)
    whole = artifact.main_file.read_bytes()
    head = artifact.manifest.details["head_bytes"]
    for size in (0, 7, 64, head // 2, len(whole) // 2, len(whole) - 1):
        artifact.main_file.write_bytes(whole[:size])
        with pytest.raises(BadArtifact, match=rf"model\.pte has {size} bytes, not {len(whole)}"):
            targets.open_artifact(artifact, threads=1)
    for at in np.random.default_rng(0).integers(head, size=50):
        artifact.main_file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BadArtifact, match="not the program that was exported"):
            targets.open_artifact(artifact, threads=1)
    with pytest.raises(BadArtifact, match="not the file its manifest names"):
        targets.open_artifact(artifact.folder)
    artifact.main_file.unlink()
    with pytest.raises(BadArtifact, match="missing"):
        targets.open_artifact(artifact, threads=1)


def test_a_program_that_fails_tells_whose_version_it_is(made: Any, tmp_path: Path) -> None:
    folder = made["llama tied"][0].folder
    versions = load_artifact(folder).manifest.versions | {"executorch": "0.9.0"}
    targets.open_artifact(forge(folder, tmp_path / "fine", {}, versions=versions), threads=1).close()  # this one runs
    whole = (folder / "model.pte").read_bytes()
    other = {"model.pte": whole[:4] + b"ET11" + whole[8:]}
    said = r"does not load it.* made with executorch 0\.9\.0; this is "
    with pytest.raises(BadArtifact, match=said):
        targets.open_artifact(forge(folder, tmp_path / "other", other, versions=versions), threads=1)


def test_providers_that_there_are_not(made: Any) -> None:
    student = made["llama tied"][1]
    config = Checkpoint(student).config
    with pytest.raises(SpecError, match="take executorch-fp32"):
        targets.check(config, student, spec("fp16", providers=["vulkan"]))
    for providers in (["cuda"], ["cpu", "vulkan"]):
        with pytest.raises(SpecError, match="lowered for one, cpu or vulkan"):
            targets.check(config, student, spec(providers=providers))


@pytest.mark.slow
def test_vulkan_is_lowered_and_not_run(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "llama")
    artifact = export(student, "portable-int4", tmp_path / "out", providers=["vulkan"])
    assert artifact.manifest.details["providers"] == {"vulkan": "not run"}
    assert artifact.manifest.details["delegates"] >= 1
    with pytest.raises(EdgekdError, match="the program is for vulkan, which is not run here"):
        targets.open_artifact(artifact, threads=1)

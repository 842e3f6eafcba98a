"""The ONNX target against transformers in fp32, on two-layer random models, through onnxruntime itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
genai = pytest.importorskip("onnxruntime_genai")

from onnx import numpy_helper  # noqa: E402

import cases  # noqa: E402
from cases import (  # noqa: E402
    GRID_RECIPES,
    IDS,
    ODD_WIDTH,
    UNTIED,
    export_to,
    held,
    logits,
    mean_kl,
    quantized,
    reference,
    spec_of,
)
from edgekd import targets  # noqa: E402
from edgekd.errors import BadArtifact, EdgekdError, NoGpu, SpecError, Unsupported  # noqa: E402
from edgekd.manifest import Artifact, load_artifact  # noqa: E402
from edgekd.quant.grid import quantize_int4, quantize_int8_rows  # noqa: E402
from edgekd.quant.store.reader import open_quantized  # noqa: E402
from edgekd.quant.store.writer import new_quantized  # noqa: E402
from edgekd.spec import TargetSpec  # noqa: E402
from edgekd.student import Checkpoint  # noqa: E402
from edgekd.targets import load_recipe  # noqa: E402
from edgekd.targets.onnx.session import load  # noqa: E402

ARCHITECTURES = cases.ARCHITECTURES | UNTIED

spec, export = partial(spec_of, "onnx"), partial(export_to, "onnx")


def initialisers(artifact: Artifact, file: str = "model.onnx") -> dict[str, np.ndarray]:
    model = onnx.load(artifact.folder / file)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.fixture
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """MatMulNBits that does not round activations."""
    from edgekd.targets.onnx import graph

    build = graph.build
    monkeypatch.setattr(graph, "build", lambda arch, settings: build(arch, replace(settings, accuracy_level=0)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float_agrees_with_transformers(name: str, tmp_path: Path, student_factory: Any) -> None:
    kind, settings = ARCHITECTURES[name]
    student = student_factory(tmp_path / "student", kind, **settings)  # weights are exact in fp16
    expected = reference(student, IDS)
    actual = logits(export(student, "fp16", tmp_path / "out"), IDS)
    assert actual.shape == (200, 700) and actual.dtype == np.float32
    assert np.abs(expected - actual).max() < 2e-4  # the order of sums alone differs
    single = export(student, "onnx-fp32", tmp_path / "single")
    assert np.abs(expected - logits(single, IDS)).max() < 2e-4
    if "rope" in name:  # without the scaling the logits would be others altogether
        plain = student_factory(tmp_path / "plain", kind)
        assert np.abs(reference(plain, IDS) - expected).max() > 1


def test_fp32_keeps_what_fp16_rounds(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "qwen3")
    weights = {name: value.float() * (1 + 2**-14) for name, value in load_file(student / "model.safetensors").items()}
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    artifact = export(student, "onnx-fp32", tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(initialisers(artifact)[name].T, weights[name].numpy())
    assert 32 <= artifact.manifest.bits_per_weight < 32.1
    assert not np.array_equal(weights[name].half().float(), weights[name])


@pytest.mark.parametrize("name", [*ARCHITECTURES, "odd width", "odd width untied"])
@pytest.mark.usefixtures("exact_kernels")
def test_the_quantized_student_runs_as_its_dequantized_weights(name: str, tmp_path: Path, student_factory: Any) -> None:
    kind, settings = ARCHITECTURES.get(name, ("qwen3", ODD_WIDTH | {"tie_word_embeddings": "untied" not in name}))
    student = student_factory(tmp_path / "student", kind, **settings)
    kl = []
    for recipe in GRID_RECIPES:
        packed = quantized(student, tmp_path / f"{recipe}-quantized", recipe)
        actual = logits(export(student, recipe, tmp_path / recipe, packed), IDS)
        assert np.abs(reference(student, IDS, packed) - actual).max() < 2e-4, recipe
        kl.append(mean_kl(reference(student, IDS), actual))
    assert kl[0] > 1e-3 and kl[2] < kl[0] / 10  # each is another model


def test_int8_activations_stay_near(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "qwen3")
    packed_by = {recipe: quantized(student, tmp_path / f"{recipe}-quantized", recipe) for recipe in GRID_RECIPES}
    made = {recipe: export(student, recipe, tmp_path / recipe, packed) for recipe, packed in packed_by.items()}
    levels = {
        attribute.i
        for artifact in made.values()
        for node in onnx.load(artifact.main_file, load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == {4}
    for recipe, artifact in made.items():
        assert 1e-6 < mean_kl(reference(student, IDS, packed_by[recipe]), logits(artifact, IDS)) < 0.02, recipe


@pytest.mark.parametrize("providers", [["cuda", "cpu"], ["dml", "cpu"], ["webgpu", "cpu"]])
def test_the_graph_for_gpus_runs_on_the_cpu_too(providers: list[str], tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "qwen2")
    for recipe, packed in (("fp16", None), ("portable-int4", quantized(student, tmp_path / "quantized"))):
        artifact = export(student, recipe, tmp_path / recipe, packed, providers=providers)
        assert artifact.manifest.details["providers"] == {providers[0]: "not run", "cpu": "tested"}
        assert artifact.manifest.details["activations"] == "float16"
        (first,) = json.loads((artifact.folder / "genai_config.json").read_text())["model"]["decoder"][
            "session_options"
        ]["provider_options"]
        assert list(first) == providers[:1]
        expected = reference(student, IDS, packed)
        assert mean_kl(expected, logits(artifact, IDS)) < 0.02
        session = targets.open_artifact(artifact, threads=1)
        session.prefill(IDS[:70])
        session.prefill(IDS[70:-1])
        assert mean_kl(expected[-1:], session.decode(IDS[-1])[None]) < 0.02
        session.close()


def test_the_cache_grows_as_it_fills(tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.targets.onnx.session._LEAST_CAPACITY", 16)
    expected = reference(tiny_student, IDS)
    session = targets.open_artifact(export(tiny_student, "fp16", tmp_path / "out", context=150), threads=1)
    for _ in range(2):  # into a small cache, then into one that has grown
        session.reset()
        assert np.abs(session.prefill(IDS[:5]) - expected[4]).max() < 2e-4
        assert np.abs(session.prefill(IDS[5:31]) - expected[30]).max() < 2e-4
        for i in range(31, 150):
            assert np.abs(session.decode(IDS[i]) - expected[i]).max() < 2e-4, i
        with pytest.raises(ValueError, match="context of 150"):
            session.decode(IDS[0])
    session.close()


def unpack(q: np.ndarray, bits: int, width: int) -> np.ndarray:
    """MatMulNBits' codes as signed integers ``(N, K)``."""
    flat = q.reshape(len(q), -1)
    if bits == 8:
        return (flat.astype(np.int16) - 128).astype(np.int8)[:, :width]
    return (np.stack([flat & 15, flat >> 4], -1).reshape(len(q), -1).astype(np.int8) - 8)[:, :width]


@pytest.mark.parametrize("recipe", GRID_RECIPES)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("qwen3", {}), ("llama", {"tie_word_embeddings": False}), ("qwen2", ODD_WIDTH), ("qwen3", ODD_WIDTH)],
)
def test_the_file_holds_the_integers_bit_for_bit(
    kind: str, settings: dict[str, Any], recipe: str, tmp_path: Path, student_factory: Any
) -> None:
    student = student_factory(tmp_path / "student", kind, **settings)
    packed = open_quantized(quantized(student, tmp_path / "quantized", recipe))
    artifact = export(student, recipe, tmp_path / "out", tmp_path / "quantized")
    assert (artifact.manifest.grid_digest, artifact.manifest.method) == (packed.digest, "rtn")
    odd = {name for name in packed if name.endswith("weight") and packed.shape(name)[-1] % 32}
    assert set(artifact.manifest.int8_by_width) == {name for name in odd if packed.kinds[name] == "int8"}
    found, seen = initialisers(artifact), set()
    stacks = {"qkv_proj.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight")}
    for name in (n.removesuffix(".q") for n in found if n.endswith(".q")):
        last = name.split("self_attn.")[-1]
        sources = [name.replace(last, part) for part in stacks.get(last, (last,))]
        expected, scale = (np.concatenate(parts) for parts in zip(*(held(packed, s) for s in sources), strict=True))
        bits = 4 if packed.kinds[sources[0]] == "int4" else 8
        assert np.array_equal(unpack(found[f"{name}.q"], bits, expected.shape[1]), expected), name
        assert (found[f"{name}.scale"].astype(np.float32) == scale).all()
        padding = found[f"{name}.q"].reshape(len(expected), -1)[:, expected.shape[1] * bits // 8 :]
        assert (padding == 0x80).all()
        seen |= set(sources)
    embedding = "model.embed_tokens.weight"
    q, scale = held(packed, embedding)
    bits = 4 if packed.kinds[embedding] == "int4" else 8
    assert bits == (4 if recipe == "portable-int4-head4" and settings is not ODD_WIDTH else 8)
    assert np.array_equal(unpack(found[f"{embedding}.rows"], bits, q.shape[1]), q)
    assert (found[f"{embedding}.scale"].astype(np.float32) == scale).all()
    seen.add(embedding)
    for name in set(packed) - seen:
        source = packed.tensor(name).numpy()
        assert packed.kinds[name] == "plain"
        if name.endswith("_proj.bias"):
            at = name.rsplit(".", 2)[0]
            whole = np.concatenate([packed.tensor(f"{at}.{p}_proj.bias").numpy() for p in "qkv"])
            assert np.array_equal(found[f"{at}.qkv_proj.bias"], whole)
        else:
            assert np.array_equal(found[name], source), name


def gguf_blocks(data: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers ``(O, I)`` and fp16 scales ``(O, I/32)`` of Q4_0 or Q8_0."""
    blocks = data.reshape(len(data), -1, 18 if bits == 4 else 34)
    scale, codes = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0], np.ascontiguousarray(blocks[..., 2:])
    if bits == 8:
        return codes.view(np.int8).reshape(len(data), -1), scale
    return np.concatenate([codes & 15, codes >> 4], -1).reshape(len(data), -1).astype(np.int8) - 8, scale


@pytest.mark.parametrize("recipe", GRID_RECIPES)
def test_gguf_holds_the_same_integers(recipe: str, tmp_path: Path, student_factory: Any) -> None:
    """Every matrix; of Qwen3, whose query and key rows llama.cpp leaves in their order."""
    gguf = pytest.importorskip("gguf")
    student = student_factory(tmp_path / "student", "qwen3", tie_word_embeddings=False)
    packed = quantized(student, tmp_path / "quantized", recipe)
    ours = export(student, recipe, tmp_path / "onnx", packed)
    theirs = targets.export(
        student, TargetSpec(target="gguf", recipes=[recipe]), recipe, tmp_path / "gguf", name="tiny", quantized=packed
    )
    assert ours.manifest.grid_digest == theirs.manifest.grid_digest
    found = initialisers(ours)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs.main_file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    kinds = {name: kind for name, kind in open_quantized(packed).kinds.items() if kind != "plain"}
    assert len(kinds) == 2 * 7 + 2
    for name, kind in kinds.items():
        bits, module = (4 if kind == "int4" else 8), name.split(".")[-2]
        q, scale = gguf_blocks(tensors[names.get_name(name, try_suffixes=(".weight",))].data, bits)
        if module in ("q_proj", "k_proj", "v_proj"):
            stack = name.replace(module, "qkv_proj")
            rows = np.split(np.arange(256), [128, 192])["qkv".index(module[0])]
            codes, scales = found[f"{stack}.q"][rows], found[f"{stack}.scale"][rows]
        else:
            codes, scales = found[f"{name}.rows" if "embed" in name else f"{name}.q"], found[f"{name}.scale"]
        assert np.array_equal(unpack(codes, bits, q.shape[1]), q), name
        assert np.array_equal(scales, scale), name


def test_float_files_hold_the_student_bit_for_bit(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "qwen2")
    weights = {name: value.numpy() for name, value in load_file(student / "model.safetensors").items()}
    found = initialisers(export(student, "fp16", tmp_path / "out"))
    assert np.array_equal(found["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    for layer in range(2):
        at = f"model.layers.{layer}."
        qkv = np.concatenate([weights[f"{at}self_attn.{p}_proj.weight"] for p in "qkv"]).T
        assert np.array_equal(found[f"{at}self_attn.qkv_proj.weight"], qkv)
        assert np.array_equal(found[f"{at}mlp.down_proj.weight"], weights[f"{at}mlp.down_proj.weight"].T)


def test_two_exports_are_the_same_bytes(tmp_path: Path, tiny_student: Path) -> None:
    given = export(tiny_student, "portable-int4", tmp_path / "given", quantized(tiny_student, tmp_path / "quantized"))
    computed = export(tiny_student, "portable-int4", tmp_path / "computed")
    assert given.manifest.files == computed.manifest.files
    assert sorted(given.manifest.files) == [
        "chat_template.jinja",
        "config.json",
        "genai_config.json",
        "head.onnx",
        "model.onnx",
        "model.onnx_data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_artifact_tells_what_it_is(tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "portable-int4", tmp_path / "out", context=64)
    assert load_artifact(artifact.folder) == artifact
    manifest, details = artifact.manifest, artifact.manifest.details
    assert (manifest.target, manifest.recipe, manifest.main_file) == ("onnx", "portable-int4", "model.onnx")
    assert manifest.student_digest == Checkpoint(tiny_student).digest
    assert 5 < manifest.bits_per_weight < 9  # the embedding, int8, is most of it; norms are fp32
    assert set(manifest.versions) == {"edgekd", "onnx", "onnxruntime", "onnxruntime-genai"}
    assert details["providers"] == {"cpu": "tested"}
    nodes = onnx.load(artifact.main_file, load_external_data=False).graph.node
    assert sum(details["ops"].values()) == len(nodes)
    assert details["ops"]["com.microsoft.GroupQueryAttention"] == 2
    assert details["ops"]["com.microsoft.MatMulNBits"] == 2 * 5 + 1
    # genai's tokenizer stops at NUL, where sessions use tokenizer.json; on no other string it differs.
    assert details["tokenizer"]["used"] == "onnxruntime-genai" and details["tokenizer"]["differ"] == 1
    assert "\\x00" in details["tokenizer"]["first"]
    assert details["chat"] == {"chats": 2, "differ": 0, "first": None}
    session = targets.open_artifact(artifact.folder, threads=1)
    assert session.context_length == manifest.contract.context_length == 64
    assert session.vocab_size == manifest.contract.vocab_size == 700
    session.close()


def test_shared_bytes_are_stored_once(tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "portable-int4", tmp_path / "out")
    places = {}
    for file in ("model.onnx", "head.onnx"):
        for tensor in onnx.load(artifact.folder / file, load_external_data=False).graph.initializer:
            if tensor.external_data:
                places[file, tensor.name] = {entry.key: entry.value for entry in tensor.external_data}
    embedding = "model.embed_tokens.weight"
    assert (
        places["model.onnx", f"{embedding}.rows"]
        == places["model.onnx", f"{embedding}.q"]
        == places["head.onnx", f"{embedding}.q"]
    )
    ends = [int(place["offset"]) + int(place["length"]) for place in places.values()]
    assert max(ends) == (artifact.folder / "model.onnx_data").stat().st_size


def test_genai_runs_the_same_files(tmp_path: Path, student_factory: Any) -> None:
    artifact = export(student_factory(tmp_path / "student", "qwen3"), "fp16", tmp_path / "out")
    session = targets.open_artifact(artifact, threads=1)
    ours = list(session.generate(IDS[:50], 20))
    session.close()
    model = genai.Model(str(artifact.folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=70, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(IDS[:50]))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0))[50:] == ours and len(ours) == 20


def test_a_damaged_artifact_is_refused(tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "portable-int4", tmp_path / "out")
    data = artifact.folder / "model.onnx_data"
    whole = data.read_bytes()
    for size in (0, 100, len(whole) - 1):
        data.write_bytes(whole[:size])
        with pytest.raises(BadArtifact, match=rf"model\.onnx_data has {size} bytes, not {len(whole)}"):
            targets.open_artifact(artifact, threads=1)
        with pytest.raises(BadArtifact, match="not the file its manifest names"):
            targets.open_artifact(artifact.folder)
    data.unlink()
    with pytest.raises(BadArtifact, match=r"model\.onnx_data is missing"):
        targets.open_artifact(artifact, threads=1)
    data.write_bytes(whole)
    graph = artifact.main_file.read_bytes()
    for size in (0, 3, 20, len(graph) // 2, len(graph) - 1):
        artifact.main_file.write_bytes(graph[:size])
        with pytest.raises(BadArtifact, match="onnxruntime does not load it"):
            targets.open_artifact(artifact, threads=1)


def test_an_opset_beyond_the_runtimes_is_refused(tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "fp16", tmp_path / "out")
    model = onnx.load(artifact.main_file, load_external_data=False)
    model.opset_import[0].version = 99
    artifact.main_file.write_bytes(model.SerializeToString())
    with pytest.raises(BadArtifact, match=r"model\.onnx: onnxruntime does not load it.*opset"):
        targets.open_artifact(artifact, threads=1)


def test_a_provider_that_is_not_installed_is_named(tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "portable-int4", tmp_path / "out", providers=["cuda"])
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EdgekdError, match=r"the artifact is for cuda; this onnxruntime has .*CPUExecutionProvider"):
        targets.open_artifact(artifact, threads=1)
    with pytest.raises(EdgekdError, match="Install onnxruntime-gpu in place of onnxruntime"):
        targets.open_artifact(artifact, threads=1)
    assert targets.gpu(artifact) is None
    with pytest.raises(NoGpu, match=r"this onnxruntime computes on the CPU alone.*onnxruntime-gpu"):
        targets.describe_gpus("onnx")


def test_a_provider_that_does_not_start_is_not_the_cpus_work(tmp_path: Path, tiny_student: Path) -> None:
    """onnxruntime goes on with the CPU there, and what is measured would bear the GPU's name."""
    artifact = export(tiny_student, "fp16", tmp_path / "out", providers=["cuda"])
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    refused = pytest.raises(EdgekdError, match="does not start CUDAExecutionProvider")
    with pytest.warns(UserWarning, match="CUDA"), refused:
        load(artifact.main_file, "cuda", 1)


def test_providers_that_there_are_not(tiny_student: Path) -> None:
    config = Checkpoint(tiny_student).config
    with pytest.raises(SpecError, match="unknown execution provider 'tpu'"):
        targets.check(config, tiny_student, spec(providers=["tpu"]))
    for provider in ("coreml", "qnn", "nnapi"):
        with pytest.raises(Unsupported, match=f"provider '{provider}'"):
            targets.check(config, tiny_student, spec(providers=[provider, "cpu"]))


def test_plain_tensors_are_the_quantized_students_own(tmp_path: Path, tiny_student: Path) -> None:
    """Quantization-aware distillation changes norms too: nothing may come from the student."""
    with new_quantized(tiny_student, tmp_path / "quantized", load_recipe("portable-int4"), "qad") as writer:
        for name, kind in writer.kinds.items():
            if kind == "plain":
                writer.put_plain(name, writer.source.tensor(name) + 1)
                continue
            for rows in writer.rows(name):
                writer.put(name, *(quantize_int4(rows) if kind == "int4" else quantize_int8_rows(rows)))
    artifact = export(tiny_student, "portable-int4", tmp_path / "out", tmp_path / "quantized")
    assert artifact.manifest.method == "qad"
    found, student = initialisers(artifact), Checkpoint(tiny_student)
    norms = [name for name in student if student.shape(name)[1:] == ()]
    assert len(norms) == 2 * 4 + 1
    for name in norms:
        assert np.array_equal(found[name], (student.tensor(name) + 1).float().numpy()), name


def test_the_door_of_optimum(tmp_path: Path, tiny_student: Path) -> None:
    pytest.importorskip("optimum.commands")
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "edgekd"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, tiny_student, out, "--target", "onnx", "--recipe", "portable-int4", "--context", "128"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bits per weight" in done.stdout
    same = export(tiny_student, "portable-int4", tmp_path / "same", context=128)
    assert load_artifact(out).manifest.files == same.manifest.files
    again = subprocess.run(
        [*command, tiny_student, out, "--target", "onnx", "--recipe", "fp16", "--provider", "cuda"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr

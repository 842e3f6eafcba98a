import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from edgekd.checkpoint import Checkpoint
from edgekd.errors import DoesNotFit, EdgekdError
from edgekd.quant.grid import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8_rows
from edgekd.quant.quantize import quantize
from edgekd.quant.source import Source
from edgekd.quant.store import layout, writer
from edgekd.quant.store.layout import digest_of_integers
from edgekd.quant.store.reader import load_dequantized, open_quantized
from edgekd.quant.store.writer import new_quantized
from edgekd.targets import load_recipe

VOCAB = 160


def write(student: Path, out: Path, recipe: str = "portable-int4", **options: Any) -> dict[str, Any]:
    return quantize(student, out, load_recipe(recipe), **options)


def make_student(path: Path, kind: str, *, tied: bool, hidden: int = 64, dtype: torch.dtype = torch.float32) -> Path:
    """A random two-layer model folder, in shards, with a file that stands for the tokenizer."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": tied,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**shape)) if kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**shape))
    model.to(dtype).save_pretrained(path, max_shard_size="60KB")
    (path / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
    return path


def expected(name: str, w: torch.Tensor, recipe: str = "portable-int4") -> torch.Tensor:
    """The grid's value of a student's tensor, without the folder."""
    if w.ndim != 2:
        return w.float()
    head = "embed_tokens" in name or "lm_head" in name
    if recipe == "int8" or (recipe == "portable-int4" and head) or w.shape[1] % 32:
        return dequantize_int8(*quantize_int8_rows(w))
    return dequantize_int4(*quantize_int4(w))


def student_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, kind: str, tied: bool, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(layout, "BLOCK_WEIGHTS", 500)  # several blocks a matrix
    monkeypatch.setattr(writer, "SHARD_BYTES", 10_000)  # several shards
    student = make_student(tmp_path / "student", kind, tied=tied, dtype=dtype)
    steps: list[float] = []
    figures = write(student, tmp_path / "quantized", on_progress=lambda done, note: steps.append(done))
    packed = open_quantized(tmp_path / "quantized")

    original = student_tensors(student)
    assert list(packed) == sorted(original)
    assert ("lm_head.weight" in packed) is not tied
    for name, w in original.items():
        value = packed.tensor(name)
        assert torch.equal(value.float(), expected(name, w)), name
        assert packed.shape(name) == tuple(w.shape)
        assert (packed.kinds[name] == "plain") is (w.ndim == 1)
        if w.ndim == 1:
            assert value.dtype == dtype and torch.equal(value, w)
    q, scale = packed.integers("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(q, quantize_int4(original["model.layers.1.mlp.down_proj.weight"])[0])
    assert scale.shape == (64, 3) and scale.dtype == torch.float32
    q, scale = packed.integers("model.embed_tokens.weight")
    assert torch.equal(q, quantize_int8_rows(original["model.embed_tokens.weight"])[0]) and scale.shape == (VOCAB,)

    assert packed.config == json.loads((student / "config.json").read_text())
    assert (tmp_path / "quantized" / "tokenizer.json").read_text() == (student / "tokenizer.json").read_text()
    assert not list(tmp_path.glob("*.partial"))
    assert steps[-1] == 1 and steps == sorted(steps)
    assert sum(math.prod(packed.shape(name)) for name in packed) == sum(w.numel() for w in original.values())
    assert figures["digest"] == packed.digest and figures["tensors"]["int4"] == 14
    assert len(list((tmp_path / "quantized").glob("model-*.safetensors"))) > 3


@pytest.mark.parametrize("recipe", ["int8", "portable-int4-head4"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_recipes_hold_their_own_kinds(tmp_path: Path, recipe: str, tied: bool, monkeypatch) -> None:
    monkeypatch.setattr(layout, "BLOCK_WEIGHTS", 500)
    student = make_student(tmp_path / "student", "qwen3", tied=tied)
    write(student, tmp_path / "quantized", recipe)
    packed = open_quantized(tmp_path / "quantized")
    assert set(packed.kinds.values()) == {"plain", "int8" if recipe == "int8" else "int4"}
    for name, w in student_tensors(student).items():
        assert torch.equal(packed.tensor(name), expected(name, w, recipe)), name


def test_a_student_and_its_quantized_form_are_read_alike(tmp_path: Path) -> None:
    path = make_student(tmp_path / "student", "llama", tied=True, dtype=torch.bfloat16)
    write(path, tmp_path / "quantized")
    student, packed = Checkpoint(path), open_quantized(tmp_path / "quantized")
    sources: list[Source] = [student, packed]
    for source in sources:
        assert sorted(source.kinds) == sorted(student) and source.tied
        for name, kind in source.kinds.items():
            assert source.shape(name) == tuple(source.tensor(name).shape) == student.shape(name)
            if kind == "plain":
                assert source.tensor(name).dtype == torch.bfloat16
                continue
            q, scale = (torch.cat(parts) for parts in zip(*source.blocks(name), strict=True))
            assert torch.equal(source.tensor(name), (dequantize_int4 if kind == "int4" else dequantize_int8)(q, scale))
    assert set(student.kinds.values()) == {"plain"} != set(packed.kinds.values())
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is not quantized"):
        student.blocks("model.norm.weight")


def test_a_writer_that_is_not_given_every_row_leaves_nothing(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", "llama", tied=True)
    with (
        pytest.raises(AssertionError, match="rows are missing"),
        new_quantized(student, tmp_path / "quantized", load_recipe("portable-int4"), "rtn"),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student"]


def test_recipes_not_on_the_grid_are_refused(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", "llama", tied=True)
    with pytest.raises(EdgekdError, match="'fp16' quantizes nothing"):
        write(student, tmp_path / "quantized", "fp16")


def test_the_digest_is_of_the_integers_not_of_the_files(tmp_path: Path, monkeypatch) -> None:
    student = make_student(tmp_path / "student", "qwen3", tied=False)
    one = write(student, tmp_path / "one")["digest"]
    monkeypatch.setattr(writer, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(layout, "BLOCK_WEIGHTS", 300)
    assert write(student, tmp_path / "many")["digest"] == one
    packed = open_quantized(tmp_path / "one")
    whole = {name: packed.integers(name) for name in reversed(list(packed)) if packed.kinds[name] != "plain"}
    assert digest_of_integers((name, [block]) for name, block in whole.items()) == one
    name = "model.layers.0.mlp.up_proj.weight"
    q, scale = whole[name]
    changed = q.clone()
    changed[0, 0] = 7 if changed[0, 0] != 7 else 6
    assert digest_of_integers((n, [(changed, scale) if n == name else b]) for n, b in whole.items()) != one
    doubled = scale.clone()
    doubled[0, 0] *= 2
    assert digest_of_integers((n, [(q, doubled) if n == name else b]) for n, b in whole.items()) != one


def test_widths_off_the_grid_become_int8(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", "llama", tied=True, hidden=50)
    figures = write(student, tmp_path / "quantized")
    packed = open_quantized(tmp_path / "quantized")
    assert "model.embed_tokens.weight" in figures["int8_by_width"]  # width 50, though the recipe says int8 anyway
    assert "model.layers.0.mlp.up_proj.weight" in figures["int8_by_width"]  # input width 50
    assert packed.kinds["model.layers.0.mlp.down_proj.weight"] == "int4"  # input width 96
    for name, w in student_tensors(student).items():
        assert torch.equal(packed.tensor(name), expected(name, w)), name


def test_bits_per_weight(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", "llama", tied=True)
    bits = write(student, tmp_path / "quantized")["bits_per_weight"]
    embedding, norms = VOCAB * 64, 5 * 64
    linear = sum(w.numel() for w in student_tensors(student).values()) - embedding - norms
    assert bits == pytest.approx(
        (4.5 * linear + 8 * embedding + 16 * VOCAB + 32 * norms) / (linear + embedding + norms)
    )


def change_byte(path: Path, tensor: str) -> None:
    """Flip one bit of a tensor's first byte."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[tensor]["data_offsets"][0]] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("tensor", "digest"),
    [
        ("model.layers.0.mlp.up_proj.weight_packed", "grid_digest"),
        ("model.layers.0.mlp.up_proj.weight_scale", "grid_digest"),
        ("lm_head.weight_packed", "grid_digest"),
        ("model.embed_tokens.weight_scale", "grid_digest"),
        ("model.norm.weight", "plain_digest"),
    ],
)
def test_a_changed_tensor_is_found(tmp_path: Path, tensor: str, digest: str) -> None:
    write(make_student(tmp_path / "student", "llama", tied=False), tmp_path / "quantized")
    for path in (tmp_path / "quantized").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            inside = tensor in file.keys()  # noqa: SIM118 - not a mapping
        if inside:
            change_byte(path, tensor)
    with pytest.raises(EdgekdError, match=f"{digest} does not match"):
        open_quantized(tmp_path / "quantized")


def test_bad_folders_are_named(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", "llama", tied=True)
    with pytest.raises(EdgekdError, match=r"no grid\.json"):
        open_quantized(student)
    write(student, tmp_path / "quantized")
    with pytest.raises(EdgekdError, match="exists already"):
        write(student, tmp_path / "quantized")
    with pytest.raises(EdgekdError, match="quantized already"):
        write(tmp_path / "quantized", tmp_path / "twice")
    with pytest.raises(EdgekdError, match="'gptq9' is unknown"):
        write(student, tmp_path / "other", method="gptq9")

    path = tmp_path / "quantized" / "grid.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"grid_digest": "0" * 64}))
    with pytest.raises(EdgekdError, match="grid_digest does not match"):
        open_quantized(tmp_path / "quantized")
    path.write_text(json.dumps(good | {"group_size": 64}))
    with pytest.raises(EdgekdError, match="'group_size'"):
        open_quantized(tmp_path / "quantized")
    path.write_text(json.dumps(good | {"tensors": good["tensors"] | {"model.extra.weight": "int4"}}))
    with pytest.raises(EdgekdError, match=r"'model\.extra\.weight_packed' is missing"):
        open_quantized(tmp_path / "quantized")
    path.write_text(path.read_text()[:50])
    with pytest.raises(EdgekdError, match=r"grid\.json: key"):
        open_quantized(tmp_path / "quantized")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_non_finite_weights_are_named_and_leave_nothing(tmp_path: Path, name: str) -> None:
    student = make_student(tmp_path / "student", "llama", tied=True)
    for path in student.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[5] = torch.nan
            save_file(tensors, path)
    with pytest.raises(EdgekdError, match=f"'{name}' holds NaN or infinite"):
        write(student, tmp_path / "quantized")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student"]


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch) -> None:
    student = make_student(tmp_path / "student", "llama", tied=True)
    usage = writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DoesNotFit, match="are free"):
        write(student, tmp_path / "quantized")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student"]


MEMORY_PROBE = """
import sys
from pathlib import Path
import torch
from edgekd.quant.store.reader import open_quantized
from edgekd.quant.quantize import quantize
from edgekd.student import check_model
from edgekd.targets import load_recipe
recipe = load_recipe("portable-int4")
check_model(Path(sys.argv[1]))  # imports transformers, and reads no weight
peak = lambda: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
torch.randn(64, 64) @ torch.randn(64, 64)
before = peak()
quantize(Path(sys.argv[1]), Path(sys.argv[2]), recipe)
written = peak()
open_quantized(Path(sys.argv[2]))
print(written - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_one_tensor_and_some_blocks(tmp_path: Path) -> None:
    """Of a student of three 64 MB matrices one and a few blocks are in memory at a time, mapped pages included."""
    size = 4096 * 4096 * 4
    sizes = {"hidden_size": 4096, "intermediate_size": 4096, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=8, num_hidden_layers=1, head_dim=32, tie_word_embeddings=True, **sizes)
    student = tmp_path / "student"
    LlamaForCausalLM(config).save_pretrained(student)
    probe = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(student), str(tmp_path / "quantized")],
        capture_output=True,
        text=True,
        check=True,
    )
    written, opened = map(int, probe.stdout.split())
    print(f"{written=} {opened=} {size=}")
    assert max(written, opened) < 2 * size


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", ["int8", "portable-int4", "portable-int4-head4"])
def test_transformers_loads_the_folder(tmp_path: Path, kind: str, tied: bool, recipe: str) -> None:
    pytest.importorskip("compressed_tensors")
    check_with_transformers(tmp_path, kind, tied, hidden=64, recipe=recipe)


def test_transformers_loads_widths_off_the_grid(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    check_with_transformers(tmp_path, "llama", True, hidden=50, recipe="portable-int4")


def check_with_transformers(tmp_path: Path, kind: str, tied: bool, hidden: int, recipe: str) -> None:
    """The folder as transformers loads it has the logits of the dequantized model, and says nothing of other keys."""
    student = make_student(tmp_path / "student", kind, tied=tied, hidden=hidden)
    write(student, tmp_path / "quantized", recipe)
    reference = load_dequantized(open_quantized(tmp_path / "quantized"))
    embedding = reference.get_input_embeddings().weight
    embedding.data = embedding.half().float()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, reference(ids).logits)

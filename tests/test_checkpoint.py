"""Model folders as strangers leave them, read by us and by transformers."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edgekd.checkpoint import HEAD, Checkpoint
from edgekd.errors import EdgekdError
from edgekd.student import check_model, load_model

IDS = torch.arange(24).view(2, 12) * 13 % 96
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def make(folder: Path, *, seed: int = 0, tied: bool = False, **keys: Any) -> Path:
    """A random Llama folder: 2 layers of 32, vocabulary 96."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = LlamaConfig(**shape, **heads, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder, **keys)
    return folder


def rewrite(folder: Path, change: Any, **keys: Any) -> Path:
    """Change the tensors and the configuration of a folder with one file."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def theirs(folder: Path) -> torch.Tensor:
    """Logits by transformers' own reading of a folder."""
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def refused(folder: Path, message: str) -> None:
    """Both the look and the loading refuse a folder, with the same words."""
    for read in (check_model, load_model):
        with pytest.raises(EdgekdError, match=message):
            read(folder)


# --- which files count ------------------------------------------------------------------------------------------------


def test_the_index_decides_which_shards_count(tmp_path: Path) -> None:
    old, new = make(tmp_path / "old", seed=1, max_shard_size="20KB"), make(tmp_path / "new", max_shard_size="30KB")
    clean = Checkpoint(new).digest
    for path in old.glob("*.safetensors"):
        shutil.copy(path, new)
    assert len(list(new.glob("*.safetensors"))) > len({at.file for at in Checkpoint(new).tensors.values()})
    assert torch.equal(logits(load_model(new)), theirs(new)) and not torch.equal(theirs(new), theirs(old))
    assert Checkpoint(new).digest == clean


def test_one_file_counts_before_an_index(tmp_path: Path) -> None:
    folder, other = make(tmp_path / "one"), make(tmp_path / "other", seed=1, max_shard_size="20KB")
    for path in other.glob("model*"):
        shutil.copy(path, folder)
    assert {at.file.name for at in Checkpoint(folder).tensors.values()} == {SINGLE}
    assert torch.equal(logits(load_model(folder)), theirs(folder))


def test_variants_and_other_files_do_not_count(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    plain = Checkpoint(folder).digest
    for name in ("model.fp16.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"x": torch.zeros(3)}, folder / name)
    (folder / "optimizer.safetensors").write_bytes(b"cut")
    (folder / "more.safetensors").mkdir()
    assert "x" not in Checkpoint(folder) and Checkpoint(folder).digest == plain
    assert torch.equal(logits(load_model(folder)), theirs(folder))


def test_shards_in_a_folder_below(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", max_shard_size="20KB")
    (folder / "shards").mkdir()
    for path in folder.glob("*.safetensors"):
        path.rename(folder / "shards" / path.name)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"shards/{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    assert torch.equal(logits(load_model(folder)), theirs(folder))


@pytest.mark.parametrize("name", ["../outside/x.safetensors", "/etc/passwd", "a\0b", "..", "", "x" * 300, "loop"])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "m")
    (folder / SINGLE).unlink()
    shutil.copytree(make(tmp_path / "other"), tmp_path / "outside")
    (tmp_path / "outside" / SINGLE).rename(tmp_path / "outside" / "x.safetensors")
    (folder / "loop").symlink_to("loop")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {UP: name}}))
    refused(folder, "leaves the folder|no usable file name|not safetensors")


@pytest.mark.parametrize("value", [None, [], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {}}, 7])
def test_an_index_that_is_none(tmp_path: Path, value: Any) -> None:
    folder = make(tmp_path / "m", max_shard_size="20KB")
    (folder / INDEX).write_text(json.dumps(value))
    refused(folder, rf"{INDEX}: (key 'weight_map' names no files|holds a)")


def test_what_the_index_promises_is_there_and_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", max_shard_size="20KB")
    index = json.loads((folder / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"stale.weight": first}}))
    refused(folder, rf"{first}: tensor 'stale.weight' is missing")
    (folder / INDEX).write_text(json.dumps(index))
    twice = next(name for name, file in index["weight_map"].items() if file == first)
    save_file(load_file(folder / last) | {twice: torch.zeros(3)}, folder / last, metadata={"format": "pt"})
    refused(folder, rf"{last}: tensor '{twice}' is there twice, in {first} too")
    (folder / last).unlink()
    refused(folder, rf"{last}: truncated or not safetensors")


def test_only_the_links_of_the_hubs_cache_lead_out(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere")
    linked = tmp_path / "linked"
    linked.mkdir()
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in elsewhere.iterdir():
        (linked / path.name).symlink_to(path)
        shutil.copy(path, hub / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    refused(linked, "leaves the folder")
    assert torch.equal(logits(load_model(snapshot)), theirs(elsewhere))
    assert Checkpoint(snapshot).digest == Checkpoint(elsewhere).digest
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(elsewhere / SINGLE)
    refused(snapshot, "leaves the folder")


def _header(value: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(value)) + value + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**60) + b"{}",
        _header(b"{" * 100_000),
        _header(b"null"),
        _header(b"[]"),
        _header(
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
            b'"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
            b"\0" * 24,
        ),
        _header(b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,16]}}', b"\0" * 16),
        _header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"\0" * 8),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    folder = make(tmp_path / "m")
    (folder / SINGLE).write_bytes(content)
    refused(folder, rf"{SINGLE}: truncated or not safetensors")


def test_other_formats_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / SINGLE).rename(folder / "weights.safetensors")
    refused(folder, r"no model\.safetensors and no .*; weights\.safetensors is not read")
    (folder / "weights.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin is not read")
    (folder / SINGLE).symlink_to("nowhere")
    refused(folder, r"no model\.safetensors")
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    refused(folder, r"no model\.safetensors")


# --- which tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_its_own_wins_over_the_tie(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make(tmp_path / "m")
    rewrite(folder, lambda w: {k: v.to(dtype) for k, v in w.items()}, tie_word_embeddings=True)
    checkpoint = Checkpoint(folder)
    assert not checkpoint.tied and checkpoint.config["tie_word_embeddings"] is False
    model = load_model(folder)
    assert checkpoint.parameters == sum(p.numel() for p in model.parameters())
    assert torch.equal(logits(model), theirs(folder))
    without = rewrite(folder, lambda w: {k: v for k, v in w.items() if k != HEAD})
    assert Checkpoint(without).tied and not torch.equal(theirs(without), logits(model))


def test_a_head_that_equals_the_embedding_is_tied(tmp_path: Path) -> None:
    """The values count, not the dtypes; where the flag is unset two equal tensors stay two."""
    embedding = "model.embed_tokens.weight"
    folder = make(tmp_path / "m")
    rewrite(folder, lambda w: w | {embedding: w[embedding].bfloat16(), HEAD: w[embedding].bfloat16().float()})
    assert not Checkpoint(folder).tied
    rewrite(folder, lambda w: w, tie_word_embeddings=True)
    assert Checkpoint(folder).tied and Checkpoint(folder).config["tie_word_embeddings"] is True
    assert Checkpoint(folder).parameters == sum(p.numel() for p in load_model(folder).parameters())
    assert torch.equal(logits(load_model(folder)), theirs(folder))


def test_of_a_tied_pair_the_head_may_be_all_there_is(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tied=True)
    expected = theirs(folder)
    rewrite(folder, lambda w: {(HEAD if "embed" in k else k): v for k, v in w.items()})
    assert HEAD not in Checkpoint(folder) and Checkpoint(folder).tied
    assert torch.equal(logits(load_model(folder)), expected)


def test_a_missing_head_is_missing_unless_it_is_tied(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    rewrite(folder, lambda w: {k: v for k, v in w.items() if k != HEAD})
    refused(folder, rf"tensor '{HEAD}' is missing")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]  # a Llama's head is its own unless the file says otherwise
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, rf"tensor '{HEAD}' is missing")
    with pytest.raises(EdgekdError, match=rf"tensor '{HEAD}' is missing"):
        _ = Checkpoint(folder).parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != UP}, rf"tensor '{UP}' is missing\."),
        (lambda w: w | {"model.layers.1.more.weight": w[UP].clone()}, r"'model\.layers\.1\.more\.weight' has no place"),
        (lambda w: w | {UP: w[UP][:-1].clone()}, rf"'{UP}' has shape \(47, 32\), by config\.json \(48, 32\)"),
        (lambda w: {f"base_model.model.{k}": v for k, v in w.items()}, "adapter"),
        (lambda w: {k.replace("up_proj", "up_proj.base_layer"): v for k, v in w.items()}, "adapter"),
        (lambda w: w | {f"{UP[:-7]}.lora_A.weight": torch.zeros(2, 32)}, "adapter"),
        (lambda w: {f"language_model.{k}": v for k, v in w.items()}, r"is missing; there is 'language_model\."),
        (lambda w: w | {UP: w[UP].to(torch.float8_e4m3fn)}, rf"'{UP}' is F8_E4M3, which is not read without"),
        (lambda w: w | {UP: w[UP].to(torch.int8)}, rf"'{UP}' is I8, which is not read without"),
    ],
)
def test_tensors_are_exactly_those_of_the_model(tmp_path: Path, change: Any, message: str) -> None:
    refused(rewrite(make(tmp_path / "m"), change), message)


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    refused(rewrite(folder, lambda w: w, quantization_config={"quant_method": "fp8"}), r"quantized already \(fp8\)")


@pytest.mark.parametrize("both", [False, True])
def test_an_adapter_is_refused(tmp_path: Path, both: bool) -> None:
    folder = make(tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    if not both:
        (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    refused(folder, "adapter")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_compiled_model_loses_its_prefix(tmp_path: Path, sharded: bool, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path / "m", **({"max_shard_size": "20KB"} if sharded else {}))
    expected = theirs(folder)
    for path in folder.glob("*.safetensors"):
        save_file({f"_orig_mod.{k}": v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    if sharded:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {f"_orig_mod.{k}": v for k, v in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))
    assert torch.equal(logits(load_model(folder)), expected)
    assert "prefix _orig_mod. is left out" in caplog.text and UP in Checkpoint(folder)


def test_both_names_of_a_compiled_tensor(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    rewrite(folder, lambda w: w | {f"_orig_mod.{UP}": torch.zeros_like(w[UP])})
    refused(folder, "is there twice")


def test_a_decoder_saved_alone_gets_its_prefix(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tied=True)
    expected = theirs(folder)
    rewrite(folder, lambda w: {k.removeprefix("model."): v for k, v in w.items()})
    assert UP in Checkpoint(folder)
    assert torch.equal(theirs(folder), expected) and torch.equal(logits(load_model(folder)), expected)


def test_what_follows_from_the_configuration_is_no_tensor(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    before = Checkpoint(folder).parameters
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}
    rewrite(folder, lambda w: w | buffers)
    assert torch.equal(logits(load_model(folder)), theirs(folder)) and Checkpoint(folder).parameters == before


def test_ordinary_folders_keep_their_digest() -> None:
    """Runs are resumed by it."""
    teacher = Path(__file__).parent.parent / "edgekd" / "teachers" / "pycode-16m"
    assert Checkpoint(teacher).digest == "cec604b3cedb9732362c02340466b30fc3b3341b7ff38a9fc584c11deea49f13"


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": 2**30},
        {"num_hidden_layers": 2**15},
        {"head_dim": 2**15},
        {"intermediate_size": 2**30},
        {"vocab_size": 2**30},
        {"num_labels": 2**30},
        {"num_hidden_layers": 2**30},
        {"head_dim": 2**30},
    ],
    ids=str,
)
def test_sizes_that_no_tensor_has_cost_nothing(tmp_path: Path, keys: dict[str, int]) -> None:
    """What transformers makes of a size before it sees a weight may take the machine's memory."""
    refused(rewrite(make(tmp_path / "m"), lambda w: w, **keys), next(iter(keys)))

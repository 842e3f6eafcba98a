"""Windows: what shares one does not see each other, chats begin at turns, and memory holds little of them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from edgekd.distill.data import SPLITS, load_windows, prepare
from edgekd.distill.head import with_head
from edgekd.distill.pack import Encoded, Packer, Windows, save_windows
from edgekd.spec import DataSpec
from edgekd.student import load_tokenizer


def packed(tmp_path, documents, context=8, isolate=True, ids_below=100):
    packer = Packer(context, ids_below, isolate=isolate, pad=0, beside=tmp_path)
    for document in documents:
        packer.add(document)
    packer.finish()
    save_windows(tmp_path / "train.safetensors", [packer], {})
    packer.close()
    return load_windows(tmp_path, "train"), packer


def document(ids, learned=None, turns=None):
    ids = np.array(ids, np.int32)
    learned = np.ones(len(ids), np.uint8) if learned is None else np.array(learned, np.uint8)
    return Encoded(ids, learned, turns, len(ids))


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [("qwen3", {"head_dim": 16}), ("llama", {}), ("gemma3_text", {"sliding_window": 4, "head_dim": 16}), ("phi3", {})],
)
def test_documents_of_a_window_do_not_see_each_other(tmp_path, model_type, keys):
    """Every document's hidden states are those of the document alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SMALL, **keys)).eval()
    texts = [list(range(start, start + length)) for start, length in ((1, 5), (20, 9), (40, 3), (60, 7))]
    windows, _ = packed(tmp_path, map(document, texts), context=24)
    batch = windows.batch(slice(0, 1))
    assert batch.positions[0].tolist() == [*range(5), *range(9), *range(3), *range(7)]
    with torch.no_grad():
        together = with_head(model).outputs(batch.ids, batch.positions).hidden[0]
        leaking = with_head(model).outputs(batch.ids).hidden[0]
        at = 0
        for text in texts:
            alone = with_head(model).outputs(torch.tensor([text])).hidden[0]
            torch.testing.assert_close(together[at : at + len(text)], alone, rtol=0, atol=2e-6)
            assert at == 0 or (leaking[at : at + len(text)] - alone).abs().max() > 1e-3
            at += len(text)


def test_nobody_learns_how_the_next_document_begins(tmp_path):
    texts = [document([1, 2, 3]), document([4, 5]), document([6, 7, 8])]
    windows, _ = packed(tmp_path, texts)
    assert windows.begins.tolist() == [[1, 0, 0, 1, 0, 1, 0, 0]]
    assert windows.batch(slice(0, 1)).mask.tolist() == [[1, 1, 0, 1, 0, 1, 1, 0]]
    windows, _ = packed(tmp_path, texts, isolate=False)
    assert windows.begins is None and windows.batch(slice(0, 1)).positions is None
    assert windows.batch(slice(0, 1)).mask.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]


def chat(number, exchanges):
    """Exchanges of so many tokens each, the last two of each the answer."""
    ids = [number * 20 + i for i in range(sum(exchanges))]
    learned = [int(i >= length - 2) for length in exchanges for i in range(length)]
    return document(ids, learned, list(np.cumsum(exchanges))[:-1])


def test_chats_begin_at_turns_and_are_fitted_together(tmp_path):
    windows, packer = packed(tmp_path, [chat(0, [5]), chat(1, [4, 4, 3]), chat(2, [3]), chat(3, [6])])
    rows = windows.ids.tolist()
    assert rows == [
        [*range(5), 28, 29, 30],  # the second chat's last turn fills what the first left
        list(range(20, 28)),
        [40, 41, 42, 0, 0, 0, 0, 0],
        [*range(60, 66), 0, 0],
    ]
    starts = {(r, c) for r, c in windows.begins.nonzero().tolist()}
    assert starts == {(0, 0), (0, 5), (1, 0), (2, 0), (2, 3), (3, 0), (3, 6)}
    assert packer.padding == 7 and packer.cut_exchanges == 0
    assert windows.loss_mask[2].tolist() == [0, 1, 1, 0, 0, 0, 0, 0], "padding is not learned"


def test_an_exchange_longer_than_a_window_is_cut_and_counted(tmp_path):
    ids, learned = list(range(1, 20)), [0] * 4 + [1] * 15
    windows, packer = packed(tmp_path, [document(ids, learned, [])])
    assert packer.cut_exchanges == 1 and windows.ids.flatten().tolist()[:19] == ids


@pytest.mark.parametrize(("ids_below", "kind"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_ids_take_two_bytes_where_they_fit(tmp_path, ids_below, kind):
    windows, _ = packed(tmp_path, [document([ids_below - 1] * 8)], ids_below=ids_below)
    assert windows.ids.dtype == kind and windows.batch(slice(0, 1)).ids.tolist() == [[ids_below - 1] * 8]


def test_some_of_the_windows_are_those_windows(tmp_path):
    windows, _ = packed(tmp_path, [document(range(1 + 7 * i, 8 + 7 * i)) for i in range(12)])
    some = windows.at(torch.tensor([3, 1]))
    assert isinstance(some, Windows) and torch.equal(some.ids, windows.ids[[3, 1]])
    assert torch.equal(some.batch(slice(0, 2)).positions, windows.batch(torch.tensor([3, 1])).positions)


CHATS = [
    {
        "messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"It is {i}."}]
        * (1 + i % 3)
    }
    for i in range(300)
]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_several_processes_give_the_same_windows(tmp_path, tiny_teacher, kind):
    rows = CHATS if kind == "chat" else [{"messages": f"def f{i}():\n    return {i}\n"} for i in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": []}]))
    found = []
    for processes in (1, 2):
        spec = DataSpec(
            source="jsonl",
            paths=["rows.jsonl"],
            column="messages",
            chat=kind == "chat",
            context=48,
            processes=processes,
        )
        out = tmp_path / str(processes)
        figures = prepare(spec, load_tokenizer(tiny_teacher), out, seed=0, base=tmp_path)
        found.append((figures, [(out / f"{split}.safetensors").read_bytes() for split in SPLITS]))
    assert found[0] == found[1]


MEASURE = """
import sys
from pathlib import Path
import numpy as np, psutil
from edgekd.distill.pack import Encoded, Packer, load_windows, save_windows
import torch
def anonymous():  # what is no file's page
    memory = psutil.Process().memory_full_info()
    return memory.rss - memory.shared
def main(folder, tokens):
    document = Encoded(np.arange(1, 1001, dtype=np.int32), np.ones(1000, np.uint8), None, 1000)
    packer = Packer(512, 65000, isolate=True, pad=0, beside=folder)
    packer.add(document)
    before = anonymous()
    for _ in range(tokens // 1000):
        packer.add(document)
    packer.finish()
    save_windows(folder / "train.safetensors", [packer], {})
    windows = load_windows(folder, "train")
    total = sum(int(windows.batch(slice(i, i + 64)).ids.sum()) for i in range(0, len(windows), 64))
    print(anonymous() - before)
main(Path(sys.argv[1]), int(sys.argv[2]))
"""


def test_memory_holds_a_fraction_of_the_tokens(tmp_path):
    tokens = 40_000_000
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path, str(tokens)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.5 * tokens

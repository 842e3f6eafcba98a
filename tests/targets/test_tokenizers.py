"""Every kind of tokenizer through every runtime: texts, chats and round trips are the reference's."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cases import skip_without
from edgekd import targets
from edgekd.conversation import chat_ids
from edgekd.spec import TargetSpec
from edgekd.verify.tokens import check_tokens

Make = Callable[..., PreTrainedTokenizerFast]
RECIPES = {"gguf": "fp16", "onnx": "onnx-fp32", "executorch": "executorch-fp32", "coreml": "fp16"}
LLAMA2_CHAT = "{% for m in messages %}<s>{{ '[INST] ' + m['content'] + ' [/INST]' }}</s>{% endfor %}"


def spelled(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With Metaspace's decoder, which spells out the tokens of bytes."""
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def without_bytes(tokenizer: PreTrainedTokenizerFast, *lost: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that lacks some bytes, as SmolLM2's."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    kept = [text for text in model["vocab"] if not set(text) & set(lost) or text.startswith("<|")]
    model["vocab"] = {text: i for i, text in enumerate(kept)}
    model["merges"] = [merge for merge in model["merges"] if not set("".join(merge)) & set(lost)]
    again = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<|endoftext|>")
    again.chat_template = tokenizer.chat_template
    return again


def unigram(scheme: str) -> PreTrainedTokenizerFast:
    """Unigram with SentencePiece's marks, as an identity normalizer leaves texts; its pieces are the words and
    characters of a text, no two scored alike, for of readings that are equally likely libraries take either."""
    words = Counter(re.findall(r" ?[A-Za-z]{2,9}|.", Path(__file__).read_text("utf-8"))).most_common()
    scores = {word.replace(" ", "▁"): -1 - 0.01 * rank for rank, (word, _) in enumerate(words)}
    special = ["<unk>", "<s>", "</s>"]
    vocab = [*((text, 0.0) for text in special), *({"▁": -2.005} | scores).items()]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=[]
    )


TOKENIZERS: dict[str, Callable[[Make, Make], PreTrainedTokenizerFast]] = {
    "byte-level": lambda bpe, _: bpe(extra=["<tool>"]),
    "BOS and EOS": lambda bpe, _: bpe(add_bos=True, add_eos=True),
    "NFC": lambda bpe, _: bpe(nfc=True),
    "bytes lost": lambda bpe, _: without_bytes(bpe(), "\u0104", "\u0107", "\u0142"),
    "SentencePiece": lambda _, sentencepiece: sentencepiece(extra=["<tool>"]),
    "SentencePiece without a prefix": lambda _, sentencepiece: sentencepiece(prefix=False),
    "Metaspace first": lambda _, sentencepiece: sentencepiece(metaspace="first"),
    "Metaspace always": lambda _, sentencepiece: sentencepiece(metaspace="always"),
    "Unigram first": lambda *_: unigram("first"),
    "Unigram always": lambda *_: unigram("always"),
    "Unigram never": lambda *_: unigram("never"),
    "Metaspace's decoder": lambda _, sentencepiece: spelled(sentencepiece(metaspace="always")),
}


@pytest.mark.parametrize("target", RECIPES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_chats_and_round_trips(
    name: str,
    target: str,
    tmp_path: Path,
    student_factory: Any,
    tokenizer_factory: Make,
    sentencepiece_factory: Make,
) -> None:
    skip_without(target)
    if target in ("executorch", "coreml") and name not in ("BOS and EOS", "bytes lost", "Metaspace first"):
        pytest.skip("their sessions read tokenizer.json as ONNX's does")
    tokenizer = TOKENIZERS[name](tokenizer_factory, sentencepiece_factory)
    tokenizer.chat_template = tokenizer.chat_template or LLAMA2_CHAT
    settings = {"num_hidden_layers": 1, "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 64}
    student = student_factory(tmp_path / "student", "llama", tokenizer, **settings)
    spec = TargetSpec(target=target, recipes=[RECIPES[target]])
    artifact = targets.export(student, spec, RECIPES[target], tmp_path / "out", name="t")
    session = targets.open_artifact(artifact, threads=1)
    found = check_tokens(session, tokenizer, artifact.manifest.contract)
    marked = "<s>a</s> b<|im_end|>\n<|im_start|>c"
    ids = chat_ids(session, artifact.manifest.contract, marked)
    session.close()
    assert found.differences == []
    assert found.strings == found.strings_identical > 300 and found.chats == found.chats_identical == 10
    assert ids == tokenizer(marked, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_tokenizer_model_alone(target: str, tmp_path: Path, student_factory: Any, sentencepiece_factory: Make) -> None:
    """As Llama 2's folder: converted by transformers, whose ids the artifact gives."""
    skip_without(target)
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    student = student_factory(tmp_path / "student", "llama", sentencepiece_factory(), vocab_size=768)
    for path in [*student.glob("tokenizer*"), *student.glob("*.jinja")]:
        path.unlink()
    trainer.train(
        input=str(Path(__file__)),
        model_prefix=str(student / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (student / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (student / "tokenizer_config.json").write_text(json.dumps(settings))
    reference = AutoTokenizer.from_pretrained(student)
    artifact = targets.export(
        student, TargetSpec(target=target, recipes=[RECIPES[target]]), RECIPES[target], tmp_path / "out", name="t"
    )
    session = targets.open_artifact(artifact, threads=1)
    found = check_tokens(session, reference, artifact.manifest.contract)
    session.close()
    assert (artifact.folder / "tokenizer.json").is_file()
    assert found.differences == [] and found.strings == found.strings_identical > 300

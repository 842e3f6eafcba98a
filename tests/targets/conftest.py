"""Tiny random students with real tokenizers: two layers, a few hundred ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_TEXTS = [Path(__file__).read_text("utf-8"), Path(torch.__file__).read_text("utf-8")[:60_000]] + [
    "Grüße, naïve café. Привет, мир, привет! 你好世界你好 안녕 1234567 2024 123 33 3333 I've don't they'll WE'RE aBc",
    "    deep\n\n\t\tdeeper   spaces     here 🚀🚀 --- === ... !!! ((( ))) /// //\n/\n x/y \r\n\r\n",
] * 40


def byte_level(*regexes: str, digits: bool = False, use_regex: bool = False) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def make_tokenizer(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    *,
    ignore_merges: bool = False,
    nfc: bool = False,
    add_bos: bool = False,
    add_eos: bool = False,
    extra: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 700 ids, ``extra`` being added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre_tokenizer or byte_level(QWEN2_REGEX)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in extra])
    single = [SPECIAL[1]] * add_bos + ["$A"] + [SPECIAL[0]] * add_eos
    if len(single) > 1:
        pairs = [(text, tokenizer.token_to_id(text)) for text in SPECIAL[:2]]
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(single), special_tokens=pairs)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1] if add_bos else None,
        extra_special_tokens=SPECIAL[1:],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_student(
    folder: Path, kind: str = "qwen3", tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any
) -> Path:
    """A random student whose weights are exact in fp16, large enough for its logits to be far apart."""
    tokenizer = tokenizer or make_tokenizer()
    config_class, model_class = CLASSES[kind]
    config = config_class(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
            **settings,
        }
    )
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 0.3 if "norm" in name or "embed" in name or "bias" in name else value.shape[-1] ** -0.5
            value.copy_(spread * torch.randn_like(value) + ("norm" in name))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 student, tied."""
    return make_student(tmp_path_factory.mktemp("student") / "qwen3")


@pytest.fixture(scope="session")
def student_factory() -> Callable[..., Path]:
    return make_student


@pytest.fixture(scope="session")
def damage_student() -> Callable[[Path, str], str]:
    """Spoil a student's weights in one way; what the error must name."""

    def damage_weights(student: Path, damage: str) -> str:
        weights = {name: value.float() for name, value in load_file(student / "model.safetensors").items()}
        name = "model.layers.0.mlp.up_proj.weight"
        if damage == "missing":
            del weights[name]
        elif damage == "extra":
            weights["model.layers.0.self_attn.sinks"] = torch.zeros(4)
        elif damage == "shape":
            weights[name] = weights[name][:-1].contiguous()
        else:
            weights[name][3, 5] = torch.nan if damage == "nan" else 1e6
        save_file(weights, student / "model.safetensors")
        return "sinks" if damage == "extra" else name

    return damage_weights


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def byte_level_factory() -> Callable[..., pre_tokenizers.PreTokenizer]:
    return byte_level


def make_sentencepiece(
    *, prefix: bool = True, metaspace: str | None = None, extra: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: SentencePiece BPE with byte fallback, BOS before every text.

    Args:
        prefix: the normalizer puts ``▁`` before every run of text.
        metaspace: instead of a normalizer, a Metaspace pre-tokenizer with this prepend scheme.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        [text[:20_000] for text in _TEXTS], trainers.BpeTrainer(vocab_size=500, limit_alphabet=120, show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    texts = special + [f"<0x{i:02X}>" for i in range(256)] + list(learned["vocab"])
    vocab = {text: i for i, text in enumerate(texts)}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in extra])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=[]
    )


@pytest.fixture(scope="session")
def sentencepiece_factory() -> Callable[..., PreTrainedTokenizerFast]:
    return make_sentencepiece


@pytest.fixture(scope="session")
def make_mlpackage() -> Callable[..., Path]:
    """Build a Core ML package for iOS 18 with coremltools: its program as written, no pass touches it."""
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    kinds = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32}

    def build(
        path: Path, body: Callable[..., Any], inputs: dict[str, tuple[str, Any]], states: Any = (), shapes: Any = None
    ) -> Path:
        """``body`` takes inputs and states by name; ``inputs`` and ``states`` give the type and shape of each.

        Args:
            shapes: coremltools' input types, where shapes are flexible.
        """
        specs = {name: mb.TensorSpec(shape, dtype=kinds[dtype]) for name, (dtype, shape) in inputs.items()}
        for name, (dtype, shape) in dict(states).items():
            specs[name] = mb.StateTensorSpec(shape, dtype=kinds[dtype])
        program = Program()
        with Function(specs, opset_version=ct.target.iOS18) as function:
            results = body(**function.inputs)
            function.set_outputs(list(results) if isinstance(results, list | tuple) else [results])
            program.add_function("main", function)
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY,
            inputs=shapes,
        )
        model.save(str(path))
        return path

    return build

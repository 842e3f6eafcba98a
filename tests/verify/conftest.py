"""A second runtime for the tests: a tiny random transformers model with its own cache, and a BPE tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from edgekd.manifest import Contract

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 384
CONTEXT = 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on, in order.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}


class TorchSession:
    """A transformers model as a session; ``perturb`` maps logits ``(T, V)`` of positions ``(T,)`` to others."""

    def __init__(self, model, tokenizer, perturb: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None) -> None:
        self.model, self.tokenizer, self.perturb = model, tokenizer, perturb
        self.vocab_size, self.context_length = VOCAB, CONTEXT
        self.reset()

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def token_bytes(self, token: int) -> bytes:
        text = self.tokenizer.convert_ids_to_tokens(token)
        return b"" if text in SPECIAL else bytes(BYTE_OF[char] for char in text)

    def reset(self) -> None:
        self.cache = transformers.DynamicCache()

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        start = self.cache.get_seq_length()
        if not 0 < len(ids) <= self.context_length - start:
            raise ValueError(f"{len(ids)} ids do not fit")
        with torch.inference_mode():
            logits = self.model(torch.tensor([list(ids)]), past_key_values=self.cache).logits[0].float().numpy()
        if self.perturb:
            logits = self.perturb(logits, np.arange(start, start + len(ids)))
        return logits if all_logits else logits[-1]

    def decode(self, token: int) -> np.ndarray:
        return self.prefill([token])

    def generate(self, ids, max_tokens, *, temperature=0.0, seed=0) -> Iterator[int]:
        self.reset()
        logits = self.prefill(ids)
        for _ in range(max_tokens):
            token = int(logits.argmax())
            yield token
            logits = self.decode(token)

    def close(self) -> None:
        self.reset()


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def reference(model) -> Callable[[np.ndarray], np.ndarray]:
    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(np.asarray(ids, np.int64))[None]).logits[0].float().numpy()

    return logits


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["def main(self):\n    return self.value for the rest of it\n"] * 9, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture
def session(model, tokenizer) -> TorchSession:
    return TorchSession(model, tokenizer)


@pytest.fixture
def perturbed(model, tokenizer) -> Callable[[Callable[[np.ndarray, np.ndarray], np.ndarray]], TorchSession]:
    """A session of the model whose logits are changed on their way out."""
    return lambda perturb: TorchSession(model, tokenizer, perturb)


@pytest.fixture(scope="session")
def windows() -> np.ndarray:
    return np.random.default_rng(1).integers(3, VOCAB, size=(5, 40)).astype(np.int32)


@pytest.fixture(scope="session")
def contract() -> Contract:
    return Contract(
        context_length=CONTEXT,
        vocab_size=VOCAB,
        bos_id=None,
        eos_ids=[0],
        add_bos=False,
        chat_template=TEMPLATE,
        special_ids={text: i for i, text in enumerate(SPECIAL)},
    )

"""Train the embedded teacher ``pycode-16m`` on the standard library, from nothing: tokenizer, model, card figures.

    python -m edgekd.teachers.train_pycode OUT_FOLDER [--steps N]

Qwen3 shape, 15.9M parameters, byte-level BPE of 8,192. Muon on the matrices, AdamW on the rest, warm-up, a constant
rate, and a linear decay over the last 30 % of the steps. Stopping and starting again with the same folder goes on from
the last checkpoint. The final model alone is fp16.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..distill.corpus import stdlib_corpus
from ..distill.data import Windows
from ..distill.evaluate import evaluate
from ..distill.train import Descent, train
from ..files import write_json
from ..spec import TrainingSpec
from ..student import save_model

CONTEXT = 1024
BATCH = 8
VOCAB = 8192
PEAK_LR = 3e-3
WARMUP_STEPS = 60
DECAY_SHARE = 0.3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's pre-tokenizer: known to llama.cpp, and it keeps ":\n" and runs of indentation whole.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB, context: int = CONTEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` ids that adds no BOS and ends documents with ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> Windows:
    """Documents joined by the end-of-text id, cut to windows of ``CONTEXT`` tokens."""
    flat: list[int] = []
    for ids in tokenizer(documents)["input_ids"]:
        flat += [*ids, tokenizer.eos_token_id]
    count = len(flat) // CONTEXT
    ids = torch.tensor(flat[: count * CONTEXT], dtype=torch.int32).view(count, CONTEXT)
    return Windows(ids, torch.ones_like(ids, dtype=torch.uint8))


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on a model's matrices, AdamW on its embedding and norms."""

    def __init__(self, model: torch.nn.Module) -> None:
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self._parts = [
            torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.95)),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each; groups and moments are this object's, which a checkpoint may have renewed."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()


def rate(steps: int, step: int) -> float:
    """The learning rate of a step, from 0: warm-up, constant, linear decay."""
    decay = max(1, int(steps * DECAY_SHARE))
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay)


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the finished teacher; checkpoints lie beside it.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of 8 windows of 1,024 tokens.")] = 1100,
    seed: int = 0,
) -> None:
    """Train the teacher and write it with its figures."""
    console = Console()
    torch.manual_seed(seed)
    corpus, library = stdlib_corpus(include_tests=True), stdlib_corpus()
    state = out.with_name(out.name + ".training")
    if not (state / "tokenizer.json").exists():
        train_tokenizer(corpus.train).save_pretrained(state)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(state)
    windows, validation = pack(corpus.train, tokenizer), pack(library.validation, tokenizer)
    console.print(f"{windows.ids.numel():,} tokens of training text, {steps * BATCH * CONTEXT:,} to be seen")

    model = new_model(tokenizer)
    model.model.compile()
    spec = TrainingSpec(
        loss={"cross_entropy": 1.0}, steps=steps, batch_size=BATCH, validate_every=200, checkpoint_every=200
    )
    train(
        model,
        windows,
        validation,
        spec,
        signal=None,
        seed=seed,
        work_dir=state,
        on_event=console.print,
        method=Descent(MuonAdamW(model), partial(rate, steps)),
    )
    save_model(model.half(), tokenizer, out)
    test = evaluate(model.float(), pack(library.test, tokenizer))  # what was written, rounded to fp16
    card = {"steps": steps, "tokens_seen": steps * BATCH * CONTEXT} | test
    write_json(out / "figures.json", card)
    console.print(card)


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The teacher before training."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=14,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


if __name__ == "__main__":
    typer.run(main)

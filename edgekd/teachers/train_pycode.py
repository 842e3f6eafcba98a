"""Train the embedded teacher ``pycode-16m`` on the standard library, from nothing: tokenizer, model, card figures.

    python -m edgekd.teachers.train_pycode OUT_FOLDER [--steps N]

Qwen3 shape, 15.9M parameters, byte-level BPE of 8,192. Muon (Jordan et al. 2024) on the matrices, AdamW on the rest,
warm-up, a constant rate, and a linear decay over the last 30 % of the steps. Stopping and starting again with the
same folder goes on from the last checkpoint, the optimizer's moments begun anew. The final model alone is fp16.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..distill.corpus import stdlib_corpus

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


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Documents joined by the end-of-text id, cut to windows. Returns int64 ``(windows, CONTEXT)``."""
    flat: list[int] = []
    for ids in tokenizer(documents)["input_ids"]:
        flat += [*ids, tokenizer.eos_token_id]
    windows = len(flat) // CONTEXT
    return torch.tensor(flat[: windows * CONTEXT]).view(windows, CONTEXT)


@torch.no_grad()
def evaluate(model: torch.nn.Module, windows: torch.Tensor) -> dict[str, float]:
    """Perplexity and next-token accuracy over ``(windows, CONTEXT)`` ids."""
    model.eval()
    nll, right, count = 0.0, 0, 0
    for chunk in windows.split(4):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        labels = chunk[:, 1:]
        nll += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        count += labels.numel()
    model.train()
    return {"perplexity": math.exp(nll / count), "next_token_accuracy": right / count, "tokens": count}


def rate(step: int, steps: int) -> float:
    """The learning rate's factor at a step: warm-up, constant, linear decay."""
    decay = int(steps * DECAY_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, (steps - step) / decay))


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the finished teacher; checkpoints lie beside it.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of 8 windows of 1,024 tokens.")] = 1100,
    seed: int = 0,
) -> None:
    """Train the teacher and write it with its figures."""
    console = Console()
    torch.manual_seed(seed)
    corpus, library = stdlib_corpus(include_tests=True), stdlib_corpus()
    state_dir = out.with_name(out.name + ".training")
    state_dir.mkdir(parents=True, exist_ok=True)
    if not (state_dir / "tokenizer.json").exists():
        train_tokenizer(corpus.train).save_pretrained(state_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(state_dir)
    train, validation = pack(corpus.train, tokenizer), pack(library.validation, tokenizer)
    console.print(f"{train.numel():,} tokens of training text, {steps * BATCH * CONTEXT:,} to be seen")

    model = Qwen3ForCausalLM(
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
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    step = 0
    if (state_dir / "step.json").exists():
        step = json.loads((state_dir / "step.json").read_text())["step"]
        model.load_state_dict(load_file(state_dir / f"model-{step}.safetensors"), strict=False)
    compiled = torch.compile(model)
    log = (state_dir / "log.jsonl").open("a")
    began = time.time()
    while step < steps:
        epoch, offset = divmod(step * BATCH, len(train) - BATCH + 1)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + epoch))
        batch = train[order[offset : offset + BATCH]]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            figures: dict[str, float] = {"step": step, "loss": loss.item(), "seconds": time.time() - began}
            if step % 200 == 0 or step == steps:
                figures |= evaluate(model, validation)
                state = {name: p.detach() for name, p in model.named_parameters()}
                save_file(state, state_dir / f"model-{step}.safetensors")
                (state_dir / "step.json").write_text(json.dumps({"step": step}))
            console.print(figures)
            log.write(json.dumps(figures) + "\n")
            log.flush()

    model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    model.float()
    card = {"steps": steps, "tokens_seen": steps * BATCH * CONTEXT} | evaluate(model, pack(library.test, tokenizer))
    (out / "figures.json").write_text(json.dumps(card, indent=2) + "\n")
    console.print(card)


if __name__ == "__main__":
    typer.run(main)

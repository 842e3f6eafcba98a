"""Text that the student writes itself, for the teacher to judge: it learns where it goes wrong, not where others would
(GKD, Agarwal et al. 2023; MiniLLM, Gu et al. 2023). No gradient flows through what was drawn.

Shapes: ``B`` texts, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .pack import Batch, Windows

if TYPE_CHECKING:
    from ..spec import OnPolicySpec

_GRAM = 4
_LEAST_REPEATED = 16  # tokens: a shorter text may well say a thing twice


class Written(NamedTuple):
    """What the student wrote behind the beginnings of some windows."""

    batch: Batch
    """Learned is what was written alone, of the texts that no filter dropped."""
    dropped: int


@dataclass(frozen=True)
class Writing:
    """How a student writes.

    Args:
        eos_ids: end a text.
        context: most tokens of a text.
    """

    spec: OnPolicySpec
    eos_ids: Collection[int]
    context: int

    def turn(self, seed: int, step: int) -> bool:
        """Whether a step reads what the student writes: a function of its arguments alone."""
        return bool(np.random.default_rng([seed, step, 1]).random() < self.spec.share)

    def write(
        self, model: nn.Module, windows: Windows, index: Tensor, vocab_size: int | None, seed: int, step: int
    ) -> Written:
        """Texts of the windows ``index``; what is drawn hangs on seed, step and window, not on the other texts.

        Args:
            model: of transformers.
            vocab_size: ids that may be drawn; None: all.
        """
        device = next(model.parameters()).device
        beginnings = [self._beginning(windows, int(window)) for window in index]
        draws = [
            np.random.default_rng([seed, step, 2, int(window)]).random(self.spec.max_new_tokens) for window in index
        ]
        has = [i for i, beginning in enumerate(beginnings) if len(beginning)]
        written = [torch.zeros(0, dtype=torch.int64)] * len(index)
        if has:
            uniform = torch.from_numpy(np.stack([draws[i] for i in has])).to(device)
            prompts = [beginnings[i].to(device) for i in has]
            texts = generate(model, prompts, uniform, self.spec.temperature, self.eos_ids, vocab_size)
            for i, text in zip(has, texts, strict=True):
                written[i] = text.cpu()
        keep = [self._flaw(text) not in self.spec.drop for text in written]
        return Written(_batch(beginnings, written, keep, device), keep.count(False))

    def _beginning(self, windows: Windows, window: int) -> Tensor:
        """What of a window the student goes on from: its document up to the first learned token behind
        ``prompt_tokens``; nothing where the context leaves no room behind it."""
        ids, learned = windows.ids[window].long(), windows.loss_mask[window]
        wanted = self.spec.prompt_of(self.context)
        places = learned[wanted:].nonzero().squeeze(-1)
        if not len(places) or (end := wanted + int(places[0])) + self.spec.max_new_tokens > self.context:
            return ids[:0]
        begins = [] if windows.begins is None else windows.begins[window, :end].nonzero().flatten().tolist()
        return ids[begins[-1] if begins else 0 : end]

    def _flaw(self, text: Tensor) -> str:
        """What is wrong with a text, in the spec's word; empty where nothing is."""
        words = text.tolist()
        ended = bool(words) and words[-1] in self.eos_ids
        if len(words) <= ended:
            return "empty"
        grams = [tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)]
        if len(words) >= _LEAST_REPEATED and 2 * len(set(grams)) < len(grams):
            return "repeated"
        return "" if ended else "unended"


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Tensor],
    uniform: Tensor,
    temperature: float,
    eos_ids: Collection[int],
    vocab_size: int | None = None,
) -> list[Tensor]:
    """What a model writes behind each prompt, its end token included, by its key-value cache.

    Args:
        model: a causal language model of transformers.
        prompts: ids ``(n,)``, at least one each.
        uniform: float64 ``(B, most)`` in [0, 1): one for each token to draw.
    """
    device, longest = uniform.device, max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    real = torch.stack([torch.arange(longest, device=device) >= longest - len(prompt) for prompt in prompts]).long()
    ends = torch.tensor([*eos_ids], device=device)
    written, going, cache = [], torch.ones(len(prompts), dtype=torch.bool, device=device), None
    was_training = model.training
    model.eval()
    for draw in uniform.T:
        positions = (real.cumsum(-1) - 1).clamp_min_(0)[:, -ids.shape[1] :]
        said = model(
            input_ids=ids,
            attention_mask=real,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = said.past_key_values
        token = _drawn(said.logits[:, -1, :vocab_size], temperature, draw)
        written.append(token.where(going, -1))
        going = going & ~torch.isin(token, ends)
        if not going.any():
            break
        ids, real = token[:, None], torch.cat([real, torch.ones_like(real[:, :1])], 1)
    model.train(was_training)
    return [row[row >= 0] for row in torch.stack(written, 1)]


def _drawn(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """A token of each row ``(B, V)``, where ``uniform`` falls in the distribution."""
    heaped = (logits.double() / temperature).softmax(-1).cumsum(-1)
    found = torch.searchsorted(heaped, uniform[:, None] * heaped[:, -1:], right=True).squeeze(-1)
    return found.clamp_max_(logits.shape[-1] - 1)


def _batch(
    beginnings: Sequence[Tensor], written: Sequence[Tensor], keep: Sequence[bool], device: torch.device
) -> Batch:
    """The texts side by side, padded behind their ends: nobody looks there."""
    length = max(2, *(len(a) + len(b) for a, b in zip(beginnings, written, strict=True)))
    ids, mask = (
        torch.zeros(len(written), length, dtype=torch.int64),
        torch.zeros(len(written), length, dtype=torch.uint8),
    )
    for row, (beginning, text) in enumerate(zip(beginnings, written, strict=True)):
        end = len(beginning) + len(text)
        ids[row, :end] = torch.cat([beginning, text])
        if keep[row] and len(text):
            mask[row, len(beginning) - 1 : end - 1] = 1
    return Batch(ids.to(device), ids.roll(-1, 1).to(device), mask.to(device), None)

"""Hidden states and head apart give the model's own logits; where the head is not known, the logits are taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from edgekd.distill.head import Outputs, WithHead, with_head
from edgekd.distill.losses import summed_losses
from edgekd.distill.signals import OnlineTeacher

IDS = torch.randint(0, 700, (2, 12), generator=torch.Generator().manual_seed(0))


def rows(outputs: Outputs) -> torch.Tensor:
    return outputs.rows(torch.arange(IDS.numel()))


SIZES = {"vocab_size": 700, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": None}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": None, "eos_token_id": 0}
OWN = {"gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 8.0}}


def make_model(family, tied=True):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES, **HEADS, **OWN.get(family, {}), tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite"])
def test_head_of_every_kind_is_known(family, tied):
    model = make_model(family, tied)
    made = with_head(model)
    assert made.outputs(IDS).head is not None and with_head(made) is made
    with torch.no_grad():
        expected = model(input_ids=IDS).logits.flatten(0, 1)
    torch.testing.assert_close(rows(made.outputs(IDS)), expected, rtol=1e-5, atol=1e-5)
    told = OnlineTeacher(model, 600)
    torch.testing.assert_close(told.logits(IDS).flatten(0, 1), expected[:, :600], rtol=1e-5, atol=1e-5)


class Doubling(nn.Linear):
    """A head that edgekd knows nothing of."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_an_unknown_head_is_left_to_its_model():
    model = make_model("llama")
    linear = model.get_output_embeddings()
    model.lm_head = Doubling(linear.in_features, linear.out_features, bias=False)
    made = WithHead(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits.flatten(0, 1)
    assert made.outputs(IDS).head is None and torch.equal(rows(made.outputs(IDS)), expected)

    labels, mask = IDS.roll(-1, 1), torch.ones_like(IDS)
    total, _ = made(IDS, lambda student: summed_losses(student, None, labels, mask, {"cross_entropy": 1.0}))
    total.backward()
    slopes = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(input_ids=IDS).logits.flatten(0, 1)
    nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
    for slope, parameter in zip(slopes, model.parameters(), strict=True):
        torch.testing.assert_close(slope, parameter.grad, rtol=1e-4, atol=1e-4)

"""The gate against faults of exporters and runtimes, each injected, and against sound artifacts, which it must pass.

No threshold is set: what fails is further away than the rounding of the runtime's arithmetic, measured, explains.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers

from edgekd.distill.corpus import stdlib_corpus
from edgekd.proof import TokenCheck
from edgekd.spec import Thresholds
from edgekd.student import load_model, load_tokenizer, resolve_model
from edgekd.verify.noise import _ROUND, _added_up_in_half, _rounding, noise_of
from edgekd.verify.parity import NOISE_WINDOWS, compare, first_windows, judge, measure
from edgekd.verify.reference import logits_of
from edgekd.verify.tokens import check_tokens

from .conftest import TorchSession

SAME = TokenCheck(strings=2, strings_identical=2, chats=1, chats_identical=1, round_trips=0, round_trips_identical=0)
EVERY = ["float32", "float16", "float16 throughout", "int8 by 32", "int8 by token"]


def judged(session, model, windows, arithmetic):
    """What the gate says of a session that should compute the model, in an arithmetic."""
    parity = measure(session, logits_of(model), windows, greedy_tokens=2)
    noise = noise_of(model, arithmetic, windows)
    update = {"arithmetic_kl_mean": noise, "runtime_kl_mean": first_windows(parity)}
    return judge(parity.model_copy(update=update), SAME, Thresholds())


class Rounding(TorchSession):
    """A runtime of that arithmetic, whose kernels for one row and for many round differently."""

    def __init__(self, model, tokenizer, arithmetic):
        self.arithmetic = arithmetic
        super().__init__(model, tokenizer)

    def prefill(self, ids, *, all_logits=False):
        if self.arithmetic == "float32":
            return super().prefill(ids, all_logits=all_logits)
        with _rounding(self.model, self.arithmetic):
            logits = super().prefill(ids, all_logits=True)
            with torch.inference_mode():
                nudged = torch.from_numpy(logits).float() * (1 + 1e-6 * len(ids))
        logits = nudged.numpy()
        return logits if all_logits else logits[-1]


def changed(model, change):
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other.eval()


def other_theta(model):
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 500_000.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(config)


def other_eps(model):
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 100


def swapped_heads(model):
    for name in ("q_proj", "k_proj"):
        weight = getattr(model.model.layers[0].self_attn, name).weight
        heads = weight.view(-1, model.config.head_dim, weight.shape[1])
        heads.copy_(heads.flip(0).clone())


def transposed(model):
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.copy_(weight.T.clone())


def untied(model):
    head = model.model.embed_tokens.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head.roll(1, 0))


def doubled_scale(model):
    model.model.layers[1].mlp.down_proj.weight.mul_(2)


IN_THE_MODEL = [other_theta, other_eps, swapped_heads, transposed, untied, doubled_scale]


class OffByOne(TorchSession):
    """The position is one too far after every chunk."""

    def reset(self):
        super().reset()
        self.chunks = 0

    def prefill(self, ids, *, all_logits=False):
        start = self.cache.get_seq_length()
        places = torch.arange(start, start + len(ids)) + self.chunks
        self.chunks += 1
        with torch.inference_mode():
            out = self.model(torch.tensor([list(ids)]), past_key_values=self.cache, position_ids=places[None])
        logits = out.logits[0].float().numpy()
        return logits if all_logits else logits[-1]


class ShiftedMask(TorchSession):
    """In a chunk of several tokens each sees one that it should not."""

    def prefill(self, ids, *, all_logits=False):
        start, count = self.cache.get_seq_length(), len(ids)
        sees = torch.arange(start + count)[None] <= torch.arange(start, start + count)[:, None] + (count > 1)
        mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.inference_mode():
            out = self.model(torch.tensor([list(ids)]), past_key_values=self.cache, attention_mask=mask)
        logits = out.logits[0].float().numpy()
        return logits if all_logits else logits[-1]


class Forgetful(TorchSession):
    """Each chunk starts at position 0 again."""

    def prefill(self, ids, *, all_logits=False):
        self.reset()
        return super().prefill(ids, all_logits=all_logits)


class Uncut(TorchSession):
    """What was in the cache stays, but for what has no room."""

    def reset(self):
        if not hasattr(self, "cache"):
            super().reset()
        if self.cache.get_seq_length() > 8:
            self.cache.crop(8 - self.cache.get_seq_length())


@pytest.fixture(scope="module")
def tied(model):
    """A random model: what float32 computes of it is exact to nine digits, so that every fault shows."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def trained():
    """A trained model, and text it foresees: what 8 bits leave of it."""
    folder = resolve_model("builtin:pycode-16m")
    ids = load_tokenizer(folder)(stdlib_corpus().test[0])["input_ids"]
    return load_model(folder).eval(), np.asarray(ids[:320], np.int32).reshape(5, 64)


class Session(Rounding):
    """Of a vocabulary of any size."""

    def __init__(self, model, tokenizer, arithmetic="float32"):
        super().__init__(model, tokenizer, arithmetic)
        self.vocab_size = model.config.vocab_size


@pytest.mark.parametrize("arithmetic", EVERY)
def test_a_sound_artifact_passes(tied, trained, tokenizer, windows, arithmetic):
    assert judged(Session(tied, tokenizer, arithmetic), tied, windows, arithmetic) == []
    model, text = trained
    assert judged(Session(model, tokenizer, arithmetic), model, text, arithmetic) == []


@pytest.mark.parametrize("fault", IN_THE_MODEL, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_model_fails(tied, trained, tokenizer, windows, fault):
    cases = [(tied, windows, "float32"), (*trained, "int8 by 32")]
    if fault is other_eps:
        cases.pop()  # it is smaller than what such a runtime rounds away: an fp16 artifact's gate sees it
        cases.append((*trained, "float16"))
    for model, text, arithmetic in cases:
        said = judged(Session(changed(model, fault), tokenizer, arithmetic), model, text, arithmetic)
        assert any(sentence.startswith("runtime: ") for sentence in said), arithmetic


@pytest.mark.parametrize("fault", [OffByOne, ShiftedMask, Forgetful, Uncut])
def test_a_fault_of_the_runtime_fails(tied, trained, tokenizer, windows, fault):
    for model, text, arithmetic in ((tied, windows, "float32"), (*trained, "int8 by 32")):
        session = fault(model, tokenizer)
        session.vocab_size = model.config.vocab_size
        said = judged(session, model, text, arithmetic)
        assert said, arithmetic
        if fault is Forgetful:  # one chunk alone looks right
            assert all(sentence.startswith("chunked prefill") for sentence in said)


def test_a_doubled_bos_fails(tied, tokenizer, windows, contract):
    session = TorchSession(tied, tokenizer)
    ids_of = session.tokenize
    session.tokenize = lambda text, **given: [0, *ids_of(text, **given)]
    tokens = check_tokens(session, tokenizer, contract)
    parity = measure(session, logits_of(tied), windows, greedy_tokens=2)
    assert any(text.startswith("tokens: ") for text in judge(parity, tokens, Thresholds()))


def test_the_model_is_as_it_was_after_the_rounding(tied, windows):
    before = {name: weight.clone() for name, weight in tied.state_dict().items()}
    logits = logits_of(tied)(windows[0])
    for arithmetic in EVERY:
        noise = noise_of(tied, arithmetic, windows)
        assert noise == 0 if arithmetic == "float32" else 0 < noise < 0.1
    assert all(torch.equal(before[name], weight) for name, weight in tied.state_dict().items())
    np.testing.assert_array_equal(logits_of(tied)(windows[0]), logits)


def test_half_precision_throughout_is_a_model_in_half_precision(trained):
    """But for what a matrix product keeps until its end, which torch's own leaves to the machine."""
    model, text = trained
    half = copy.deepcopy(model)
    for weight in half.parameters():
        weight.data = weight.data.half()
    expected = compare(logits_of(model), logits_of(half), text[:NOISE_WINDOWS]).kl_mean
    found = noise_of(model, "float16 throughout", text)
    assert found == pytest.approx(expected, rel=0.5)
    assert found > 2 * noise_of(model, "float16", text)


def test_rounding_is_that_of_its_definition():
    x = torch.tensor([[0.0, 1.0, -3.0, 127.0] + [0.4] * 28 + [2.0] * 3])
    by_32 = _ROUND["int8 by 32"](x)
    assert by_32.shape == x.shape and by_32[0, :5].tolist() == [0.0, 1.0, -3.0, 127.0, 0.0]
    assert by_32[0, -3:] == pytest.approx(2.0)
    by_token = _ROUND["int8 by token"](x)
    step = 130 / 255
    assert (by_token - x).abs().max() <= step / 2 + 1e-5 and by_token[0, 2] == -3.0
    assert _ROUND["int8 by token"](torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_sums_in_half_precision_are_numpys_and_cost_more_than_their_inputs_do(tied, windows):
    layer = torch.nn.Linear(300, 7)
    inputs, weight = (x.detach().half().float() for x in (torch.randn(5, 300), layer.weight))
    layer.weight.data = weight
    total = np.zeros((5, 7), np.float16)
    for k in range(300):
        product = inputs[:, k, None].numpy() * weight[:, k].numpy()
        total = (total.astype(np.float32) + product).astype(np.float16)
    with torch.no_grad():
        found = _added_up_in_half(layer, (inputs,), layer(inputs)) - layer.bias
    assert np.abs(found.numpy() - total.astype(np.float32)).max() < 1e-6
    sums, rounded = (noise_of(tied, arithmetic, windows) for arithmetic in ("float16 sums", "float16"))
    assert sums > 3 * rounded > 0

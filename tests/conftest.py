"""Settings of the whole suite, how several workers share it, and a tiny random teacher for the tests that need a whole
model folder."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

import edgekd  # noqa: F401 - before any test imports a library that it silences

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # as many as there are cores: each computes on one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shared machine stalls now and then: a slow example is not a failing one.
settings.register_profile("edgekd", deadline=None)
settings.load_profile("edgekd")

# A shell that starts the suite in the background has Ctrl-C ignored, and every child process would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

VOCAB = 320
LONGEST = (
    "targets/test_families.py",
    "test_real.py",
    "test_examples.py",
    "test_quickstart.py",
    "runs/test_run.py",
    "targets/executorch/test_target.py",
)
"""Files that take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the workers end together; last those that want the machine for themselves."""
    names = [str(Path(__file__).parent / name) for name in LONGEST]
    rank = {name: i for i, name in enumerate(names)}
    items.sort(key=lambda item: (bool(item.get_closest_marker("alone")), rank.get(str(item.path), len(rank))))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of the timeout: waiting is no part of a test
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """While a test marked ``alone`` runs, no other worker runs one."""
    if not WORKER:
        return (yield)
    with machine(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def machine(*, alone: bool) -> Iterator[None]:
    """Share the machine with the other workers' tests, or have it when none of them runs."""
    import fcntl

    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:  # closing alone would not do where a test has left a fork
            fcntl.flock(file, fcntl.LOCK_UN)


def make_tiny_teacher(folder: Path) -> Path:
    """A Qwen3-shaped model folder with a real byte-level BPE: 3 layers of 64, vocabulary 320, context 128."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from edgekd.distill.corpus import stdlib_corpus
    from edgekd.teachers import train_pycode

    tokenizer = train_pycode.train_tokenizer(stdlib_corpus().validation[:5], vocab_size=VOCAB, context=128)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """``make_tiny_teacher``'s, made once."""
    return make_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def tiny_gguf(tiny_teacher, tmp_path_factory):
    """The tiny teacher as an artifact that llama.cpp runs, made once: to be read, not written to."""
    from edgekd import targets
    from edgekd.spec import TargetSpec

    if targets.absent(targets.load_target("gguf").PACKAGES):
        pytest.skip("the target is not installed")
    out = tmp_path_factory.mktemp("tiny") / "artifact"
    return targets.export(tiny_teacher, TargetSpec(target="gguf", recipes=["fp16"]), "fp16", out, name="tiny")

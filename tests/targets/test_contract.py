"""What every target's session keeps to, on the same model: the ``Session`` protocol, checked call by call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cases import IDS, export_to, reference, skip_without
from edgekd import targets
from edgekd.conversation import chat_ids
from edgekd.manifest import Artifact
from edgekd.session import Session
from edgekd.student import load_tokenizer
from edgekd.verify.tokens import check_tokens
from scripted import spoken

CONTEXT, VOCAB = 1100, 700
LONG = (IDS * 6)[:CONTEXT]
"""More than two of the pieces that engines are fed."""
TOLERANCES = {"gguf": 0.1, "onnx": 2e-4, "executorch": 1e-4}
"""By how much logits may differ that were computed in other pieces: llama.cpp multiplies in fp16, and Core ML rounds
every tensor to it, which adds up to some roundings of the largest logit."""


NOT_LOADED = {
    "gguf": ("torch", "transformers", "gguf", "safetensors"),
    "onnx": ("torch", "transformers", "onnx", "safetensors"),
    "coreml": ("transformers", "safetensors", "coremltools"),
    "executorch": ("transformers", "safetensors"),
}


def skip_without_session(target: str) -> None:
    skip_without(target)
    if target == "coreml" and sys.platform == "darwin":
        pytest.skip("there, sessions use Core ML itself")


@pytest.fixture(scope="module", params=targets.TARGETS)
def artifact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, student_factory: Callable[..., Path]
) -> Artifact:
    skip_without_session(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    student = student_factory(folder / "student", max_position_embeddings=CONTEXT)
    return export_to(request.param, student, "fp16", folder / "out")


@pytest.fixture
def session(artifact: Artifact) -> Iterator[Session]:
    session = targets.open_artifact(artifact, threads=1)
    yield session
    session.close()


@pytest.fixture
def near(artifact: Artifact) -> Callable[[np.ndarray, np.ndarray], bool]:
    def is_near(actual: np.ndarray, expected: np.ndarray) -> bool:
        most = TOLERANCES.get(artifact.manifest.target, 8 * 2.0**-11 * float(np.abs(expected).max()))
        return bool(np.abs(actual - expected).max() < most)

    return is_near


Near = Callable[[np.ndarray, np.ndarray], bool]


def test_sizes_are_the_contracts(session: Session, artifact: Artifact) -> None:
    contract = artifact.manifest.contract
    assert (session.context_length, session.vocab_size) == (contract.context_length, contract.vocab_size)
    assert (session.context_length, session.vocab_size) == (CONTEXT, VOCAB)


def test_text_to_ids_to_bytes_to_text(session: Session, artifact: Artifact) -> None:
    text = "naïve ᚠ 𝄞 漢"
    ids = session.tokenize(text)
    assert any(session.token_bytes(token).decode("utf-8", "ignore") == "" for token in ids)
    assert b"".join(map(session.token_bytes, ids)) == text.encode()
    assert spoken(session, ids) == text
    marked = "a<|endoftext|>"
    assert b"".join(map(session.token_bytes, session.tokenize(marked))) == marked.encode()
    assert chat_ids(session, artifact.manifest.contract, marked) == [*session.tokenize("a"), 0]
    assert session.token_bytes(0) == b""


@pytest.mark.parametrize("size", [1, 7, 32])
def test_chunked_prefill(size: int, session: Session, near: Near) -> None:
    whole = session.prefill(IDS, all_logits=True)
    session.reset()
    chunks = [session.prefill(IDS[i : i + size], all_logits=True) for i in range(0, len(IDS), size)]
    assert near(np.concatenate(chunks), whole)
    session.reset()
    for i in range(0, len(IDS), size):
        last = session.prefill(IDS[i : i + size])
    assert last.shape == (VOCAB,) and last.dtype == np.float32 and near(last, whole[-1])


def test_more_than_one_batch_equals_token_by_token(session: Session, near: Near) -> None:
    whole = session.prefill(LONG, all_logits=True)
    assert whole.shape == (CONTEXT, VOCAB) and whole.dtype == np.float32
    session.reset()
    assert near(session.prefill(LONG), whole[-1])
    session.reset()
    session.prefill(LONG[:900])
    for position in range(900, CONTEXT):
        assert near(session.decode(LONG[position]), whole[position])


def test_logits_are_the_models(session: Session, artifact: Artifact, near: Near) -> None:
    assert near(session.prefill(IDS, all_logits=True), reference(artifact.folder.parent / "student", IDS))


def test_after_a_reset_nothing_is_left_of_what_was_fed(session: Session, near: Near) -> None:
    expected = session.prefill(IDS[:20], all_logits=True)
    session.decode(IDS[30])
    session.reset()
    assert near(session.prefill(IDS[:20], all_logits=True), expected)


def test_after_a_rewind_what_was_behind_is_not_seen(session: Session, near: Near) -> None:
    expected = session.prefill(IDS[:40], all_logits=True)
    session.reset()
    session.prefill(IDS[:20])
    assert session.rewind(20) == 20  # nothing to take back
    for behind in (IDS[50:90], [IDS[60]]):
        session.prefill(behind)
        assert session.rewind(20) == 20  # every runtime here can
        assert near(session.prefill(IDS[20:40], all_logits=True), expected[20:])
    for length in (-1, 99):
        with pytest.raises(ValueError, match="the cache has"):
            session.rewind(length)
    assert session.rewind(0) == 0
    assert near(session.prefill(IDS[:40], all_logits=True), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_ids_of_any_integer_type(dtype: type, session: Session) -> None:
    expected = session.prefill(IDS[:20]).copy()
    session.reset()
    assert np.array_equal(session.prefill(np.asarray(IDS[:20], dtype)), expected)


def test_generate(session: Session, artifact: Artifact, near: Near) -> None:
    greedy = list(session.generate(IDS[:50], 40))
    assert len(greedy) == 40
    expected = reference(artifact.folder.parent / "student", IDS[:50] + greedy)[49:-1]
    assert near(expected[range(40), greedy], expected.max(-1))
    drawn = [list(session.generate(IDS[:50], 40, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(list(session.generate(LONG[:1095], 40, temperature=1.0, seed=3))) <= 6


def test_a_generation_that_another_call_has_come_between_does_not_go_on(session: Session) -> None:
    whole = list(session.generate(IDS[:9], 6))
    assert len(whole) == 6
    calls: list[Callable[[], object]] = [
        session.reset,
        lambda: session.prefill(IDS[:9]),
        lambda: session.decode(IDS[0]),
        lambda: next(session.generate(IDS[:9], 6)),
    ]
    for call in calls:
        first = session.generate(IDS[:9], 6)
        assert [next(first), next(first)] == whole[:2]
        call()
        with pytest.raises(ValueError, match="used by another call"):
            next(first)
    first, second = session.generate(IDS[:9], 6), session.generate(IDS[:9], 6)
    next(first)
    assert list(second) == whole
    with pytest.raises(ValueError, match="used by another call"):
        next(first)


def test_a_generation_that_no_call_has_changed_goes_on(session: Session) -> None:
    whole = list(session.generate(IDS[:9], 6))
    last = session.generate(IDS[:9], 1)
    assert next(last) == whole[0]
    session.reset()
    assert list(last) == []  # it was at its end
    tokens = session.generate(IDS[:9], 6)
    assert [next(tokens), session.tokenize("a") and next(tokens), *tokens] == whole


def test_wrong_ids_are_refused(session: Session) -> None:
    for ids, cause in (([], "no ids"), ([VOCAB], "outside"), ([-1], "outside"), ([3] * (CONTEXT + 1), "exceed")):
        with pytest.raises(ValueError, match=cause):
            session.prefill(ids)
    for call in (session.decode, session.token_bytes):
        for token in (VOCAB, -1):
            with pytest.raises(ValueError, match="outside the vocabulary"):
                call(token)


def test_a_full_context_takes_no_more(session: Session) -> None:
    session.prefill([3] * CONTEXT)
    for call in (lambda: session.decode(3), lambda: session.prefill([3])):
        with pytest.raises(ValueError, match=f"exceed the context of {CONTEXT}"):
            call()
    session.reset()
    assert session.decode(3).shape == (VOCAB,)


def test_opening_loads_what_the_runtime_needs_alone(artifact: Artifact) -> None:
    opener = targets.open_artifact  # a spawned process finds it by name
    assert getattr(sys.modules[opener.__module__], opener.__qualname__) is opener
    code = (
        "import sys; from pathlib import Path; from edgekd.targets import open_artifact\n"
        "session = open_artifact(Path(sys.argv[1]), threads=1); session.prefill([3, 4]); session.decode(5)\n"
        "session.prefill([3, 4], all_logits=True); session.tokenize('a'); session.close()\n"
        "print(*(name for name in sys.argv[2:] if name in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(artifact.folder), *NOT_LOADED[artifact.manifest.target]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")  # and the runtime is silent


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
@pytest.mark.parametrize("target", ["gguf", "onnx", "coreml"])
def test_tokens_are_the_students(
    target: str, kind: str, tmp_path: Path, student_factory: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    skip_without_session(target)
    factory = request.getfixturevalue("tokenizer_factory" if kind == "byte level" else "sentencepiece_factory")
    student = student_factory(tmp_path / "student", "llama", factory(nfc=True) if kind == "byte level" else factory())
    artifact = export_to(target, student, "fp16", tmp_path / "out")
    session = targets.open_artifact(artifact, threads=1)
    result = check_tokens(session, load_tokenizer(student), artifact.manifest.contract)
    session.close()
    assert not result.differences, result.differences


def test_a_closed_session_does_nothing(session: Session) -> None:
    session.close()
    session.close()
    calls: list[Callable[[], object]] = [
        lambda: session.tokenize("a"),
        lambda: session.token_bytes(3),
        session.reset,
        lambda: session.prefill([3]),
        lambda: session.decode(3),
        lambda: next(session.generate([3], 2)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()

"""``edgekd eval``: the harness's own class for transformers is the reference, request by request."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from edgekd import targets
from edgekd.conversation import ChatTemplate
from edgekd.errors import EdgekdError, SpecError
from edgekd.evaluation.lm import SessionLM
from edgekd.evaluation.reference import open_reference
from edgekd.evaluation.run import beside, score
from edgekd.evaluation.tasks import LINES, builtin_tasks, load_tasks, read_task
from edgekd.manifest import load_artifact
from edgekd.proof import Figure, TaskScore
from edgekd.spec import TargetSpec
from edgekd.student import load_model, load_tokenizer

CONTEXT = 128
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
YAML = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: mine.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: options
doc_to_target: right
"""
ROWS = [{"q": f"x{i} =", "options": ["1", "None", "[x for"], "right": i % 3} for i in range(12)]


def with_bos(teacher: Path, folder: Path) -> Path:
    """The teacher, with a tokenizer that puts a BOS before a text, and a template that writes it."""
    shutil.copytree(teacher, folder)
    tokenizer = load_tokenizer(folder)
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.all_special_tokens[0]
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["no BOS", "BOS"])
def model(request: pytest.FixtureRequest, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "no BOS":
        return tiny_teacher
    return with_bos(tiny_teacher, tmp_path_factory.mktemp("bos") / "model")


@pytest.fixture(scope="module")
def both(model: Path) -> Iterator[tuple[SessionLM, HFLM]]:
    session, contract = open_reference(model, CONTEXT)
    tokenizer = load_tokenizer(model)
    assert contract.add_bos == (tokenizer.bos_token is not None)
    theirs = HFLM(pretrained=load_model(model).eval(), tokenizer=tokenizer, batch_size=1, max_length=CONTEXT)
    yield SessionLM(session, contract, chat=False), theirs
    session.close()


def requests(kind: Any, *given: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in given]


PAIRS = [
    ("def f(x):\n    return", " x"),
    ("def f(x):\n    return ", "x"),
    ("def f(x):\n    return", " None\n"),
    ("import os\n\n", "import sys"),
    ("a = 1  \n", " b"),
    ("", "class A:"),
    ("é世", "😀"),
    ("x = " * 100, "y"),
    ("x", "=" * 60),
]


def test_scores_are_those_of_the_harnesss_own_class(both: tuple[SessionLM, HFLM]) -> None:
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True) for lm in both)
    for pair, (got, greedy), (expected, expected_greedy) in zip(PAIRS, ours, theirs, strict=True):
        assert got == pytest.approx(expected, abs=2e-4), pair
        assert greedy == expected_greedy, pair
    assert ours[0] == pytest.approx(ours[1])  # the trailing space belongs to the continuation
    assert len({round(logprob, 3) for logprob, _ in ours}) == len(PAIRS) - 1


def test_whole_texts_are_scored_in_the_same_windows(both: tuple[SessionLM, HFLM]) -> None:
    """But for a BOS that stands twice in the harness's class, as prefix and as part of the text."""
    ours, theirs = both
    texts = [("def f(x):\n    return x\n",), ("import os\nprint(os.getcwd())\n" * 20,), ("a",)]
    got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    bare, theirs.add_bos_token = theirs.add_bos_token, False
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    theirs.add_bos_token = bare
    assert got == pytest.approx(expected, rel=1e-4)


def test_answers_are_the_same_and_end_at_the_same_texts(both: tuple[SessionLM, HFLM]) -> None:
    options = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    given = [("def f(x):\n    return", options), ("import os", options | {"until": [" ", "\n"]})]
    given.append(("x = 1\n" * 60, options))
    ours, theirs = both
    got = ours.generate_until(requests("generate_until", *given))
    assert got == theirs.generate_until(requests("generate_until", *given), disable_tqdm=True)
    assert any(got)


def test_a_context_without_ids_and_a_continuation_that_melts_into_it(both: tuple[SessionLM, HFLM]) -> None:
    """Where the harness's class fails, or scores nothing."""
    ours, _ = both
    for context, continuation in ((" ", "x"), ("\n\n", "x"), ("retur", "n"), ("x", "")):
        before, scored = ours._encode_pair(context, continuation)
        assert before and scored
        whole = ours.tok_encode(context + continuation)
        assert [*before, *scored] == whole or [*before, *scored] == [ours.prefix_token_id, *whole]
    ((logprob, _),) = ours.loglikelihood(requests("loglikelihood", ("retur", "n")))
    assert logprob < 0


def test_what_cannot_be_asked(both: tuple[SessionLM, HFLM]) -> None:
    ours, _ = both
    with pytest.raises(EdgekdError, match="exceeds the context of 128"):
        ours.loglikelihood(requests("loglikelihood", ("a", "b = c\n" * 100)))
    with pytest.raises(EdgekdError, match="answers of 500 tokens"):
        ours.generate_until(requests("generate_until", ("a", {"until": [], "max_gen_toks": 500})))
    with pytest.raises(EdgekdError, match="asks for num_beams"):
        ours.generate_until(requests("generate_until", ("a", {"until": [], "max_gen_toks": 5, "num_beams": 4})))


def test_a_chat_has_one_bos_and_its_special_tokens(tiny_teacher: Path, tmp_path: Path) -> None:
    model = with_bos(tiny_teacher, tmp_path / "model")
    session, contract = open_reference(model, CONTEXT)
    lm, tokenizer = SessionLM(session, contract, chat=True), load_tokenizer(model)
    for chat, prompt in (
        ([{"role": "user", "content": "hi"}], True),
        ([{"role": "assistant", "content": "so "}], False),
    ):
        text = lm.apply_chat_template(chat, add_generation_prompt=prompt)
        options: Any = {"add_generation_prompt": prompt, "continue_final_message": not prompt}
        assert text == tokenizer.apply_chat_template(chat, tokenize=False, **options)
        ids = lm.tok_encode(text)
        assert ids == tokenizer.apply_chat_template(chat, return_dict=False, **options)
        assert ids.count(contract.bos_id) == 1 == ids.index(contract.bos_id) + 1
    assert ChatTemplate(TEMPLATE, {}).source == lm.chat_template()
    session.close()


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text(YAML)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "mine.yaml"


def test_a_task_file_is_run_from_anywhere(task: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it scores is what its log-likelihoods say."""
    monkeypatch.chdir("/")
    session, contract = open_reference(tiny_teacher, CONTEXT)
    lm = SessionLM(session, contract, chat=False)
    (found,) = [s for s in score(session, contract, [str(task)]) if s.metric == "acc"]
    asked = [(row["q"], f" {choice}") for row in ROWS for choice in row["options"]]
    logprobs = [value for value, _ in lm.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)]
    chosen = [max(range(3), key=lambda c, at=at: logprobs[3 * at + c]) for at in range(len(ROWS))]
    right = [float(choice == row["right"]) for choice, row in zip(chosen, ROWS, strict=True)]
    assert found.score.samples == right and found.score.value == pytest.approx(sum(right) / len(right))
    assert (found.task, found.documents, found.fewshot, found.higher_is_better) == ("mine", 12, 0, True)
    session.close()


def test_limit_examples_and_answers(task: Path, tiny_teacher: Path) -> None:
    session, contract = open_reference(tiny_teacher, CONTEXT)
    for found in score(session, contract, [str(task)], limit=5, fewshot=2):
        assert (found.documents, found.fewshot, len(found.score.samples)) == (5, 2, 5)
    task.write_text(
        YAML.replace("multiple_choice", "generate_until").replace("doc_to_choice: options\n", "")
        + 'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n'
    )
    (found,) = score(session, contract, [str(task)], limit=2)
    assert found.metric == "exact_match" and found.score.value == 0
    with pytest.raises(EdgekdError, match="no chat template"):
        score(session, contract.model_copy(update={"chat_template": None}), [str(task)], chat=True)
    session.close()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("task: mine", "name: mine", "no key 'task'"),
        ("dataset_path: json", "dataset_path: hellaswag", "dataset_path is 'hellaswag'"),
        ("mine.jsonl", "other.jsonl", "'other.jsonl' is no file beside it"),
        ("mine.jsonl", "https://example.org/a.jsonl", "is no file beside it"),
        ("{data_files: {test: mine.jsonl}}", "{data_files: {}}", "names no file"),
        ('"{{q}}"', "!function utils.text", "tag"),
        ('"{{q}}"', '"{{nothing}}"', "nothing"),
        ('"{{q}}"', '"{{ q.__class__.__mro__ }}"', "unsafe"),
        ("output_type: multiple_choice", "output_type: multiple_guess", "multiple_guess"),
        ("task: mine", "class: !function a.B\ntask: mine", "tag"),
        ("task: mine", "class: B\ntask: mine", "key 'class'"),
        ("task: mine", "include: other.yaml\ntask: mine", "key 'include'"),
        ("task: mine", "task: [", "not valid YAML"),
    ],
)
def test_a_task_that_cannot_be_run_says_why(task: Path, tiny_teacher: Path, old: str, new: str, said: str) -> None:
    assert old in YAML
    task.write_text(YAML.replace(old, new))
    session, contract = open_reference(tiny_teacher, CONTEXT)
    with pytest.raises(EdgekdError, match=said) as caught:
        score(session, contract, [str(task)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    session.close()


def test_unknown_names_are_answered_with_near_ones(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'fact' is no file and no known task; did you mean 'facts'"):
        load_tasks(["fact"], tmp_path)


@pytest.mark.parametrize("name", builtin_tasks())
def test_the_tasks_that_come_with_it_are_whole(name: str, tmp_path: Path) -> None:
    rows = list(load_tasks([name], tmp_path)["tasks"][name].dataset["test"])
    for row in rows:
        assert len(set(row["choices"])) == len(row["choices"]) == 4 and 0 <= row["label"] < 4
    places = [row["label"] for row in rows]
    assert len(rows) >= 60 and all(places.count(place) > len(rows) / 12 for place in range(4))


def test_the_lines_are_the_next_ones(tmp_path: Path) -> None:
    from edgekd.distill.corpus import stdlib_corpus

    text = "\n".join("\n".join(document.splitlines()) for document in stdlib_corpus().test)
    task = load_tasks([LINES], tmp_path)["tasks"][LINES]
    for row in task.dataset["test"]:
        assert row["context"] + row["choices"][row["label"]] in text
    (tmp_path / "again").mkdir()
    again = load_tasks([LINES], tmp_path / "again")["tasks"][LINES]
    assert list(again.dataset["test"]) == list(task.dataset["test"])


def test_a_file_of_one_split_alone(task: Path, tmp_path: Path) -> None:
    task.write_text(YAML.replace("{test: mine.jsonl}", "mine.jsonl"))
    found = read_task(task, tmp_path)["dataset_kwargs"]["data_files"]
    assert found == {"test": str(tmp_path / "mine.jsonl")}


# --- retention --------------------------------------------------------------------------------------------------------


def scored(samples: list[float], **more: Any) -> TaskScore:
    figure = Figure(value=sum(samples) / len(samples), source="measured:test", samples=samples)
    plain = {"task": "t", "metric": "acc", "filter": "none", "fewshot": 0, "chat": False, "higher_is_better": True}
    return TaskScore(**{**plain, "documents": len(samples), "score": figure, **more})


def test_retention_is_of_the_same_documents() -> None:
    ours, theirs = [1.0] * 54 + [0.0] * 46, [1.0] * 60 + [0.0] * 40
    (found,) = beside([scored(ours)], [scored(theirs)], "teacher")
    assert found.retention == pytest.approx(0.9) and found.reference_name == "teacher"
    low, high = found.retention_ci95 or (0, 0)
    # Of the 60 that the reference knows, 54 are kept: a binomial of 0.9 ± 1.96 · sqrt(0.9 · 0.1 / 60)
    assert low == pytest.approx(0.9 - 0.076, abs=0.02) and high == pytest.approx(0.9 + 0.076, abs=0.03)
    assert found.kept.replace("\u00a0", " ").startswith("90.0 % (8")
    (none,) = beside([scored(ours)], [scored([0.0] * 100)], "teacher")
    assert none.retention is None and none.kept == ""
    (lower,) = beside([scored(ours, higher_is_better=False)], [scored(theirs)], "teacher")
    assert lower.retention is None


def test_eval_of_an_artifact_by_the_command_line(task: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """Scores go into the manifest, and from there into the report."""
    if targets.absent(targets.load_target("gguf").PACKAGES):
        pytest.skip("the target is not installed")
    spec = TargetSpec(target="gguf", recipes=["fp16"])
    artifact = targets.export(tiny_teacher, spec, "fp16", tmp_path / "artifact", name="tiny")
    words = ["eval", artifact.folder, "--tasks", f"{task},facts", "--limit", "6", "--reference", tiny_teacher, "--json"]
    command = [sys.executable, "-c", "from edgekd.cli import main; main()", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {s["task"] for s in told} == {"mine", "facts"}
    assert all(s["score"]["samples"] == s["reference"]["samples"] for s in told if s["metric"] == "acc")
    loaded = load_artifact(artifact.folder)
    assert [s.model_dump() for s in loaded.manifest.tasks] == told
    from edgekd.benchmarks.report.tables import artifact_tables
    from edgekd.results import MadeArtifact

    (table,) = artifact_tables([MadeArtifact(manifest=loaded.manifest, folder="x", size_bytes=1)])
    (group,) = [group for group in table.groups if group.title == "Tasks"]
    assert group.rows[0].title == "mine acc" and f"of {tiny_teacher}" in group.rows[0].cells[0].range

"""A teacher behind a server: its log-probabilities as outcomes, and every answer that is of no use."""

from __future__ import annotations

import json
import math
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from pydantic import ValidationError

from edgekd.distill.head import Outputs
from edgekd.distill.losses import LOSSES, Buckets, Settings, summed_losses
from edgekd.distill.served import ServedTeacher
from edgekd.distill.signals import OnlineTeacher
from edgekd.errors import EdgekdError, SpecError
from edgekd.spec import ServedSpec, Spec
from edgekd.student import load_model

VOCAB = 19


def outcomes(logits, ids):
    """Distributions ``(..., K + 1)``: of some ids, and of all others together."""
    p = logits.softmax(-1).gather(-1, ids)
    return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)


def told(seed=0, shape=(2, 3), top=4):
    """Logits of student and teacher, and what a server would tell of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(*shape, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = teacher.topk(top).indices
    return student, teacher, Buckets(ids, outcomes(teacher, ids).log())


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cross_entropy"])
def test_a_loss_is_that_of_the_outcomes_and_its_gradient_true(name):
    student, teacher, buckets = told()
    labels, mask = torch.randint(0, VOCAB, (2, 3)), torch.tensor([[1, 1, 0], [1, 1, 1]])
    settings = Settings(1.0, 0.3, 0.2)

    def total(hidden, said):
        weights = {name: 1.0, "cross_entropy": 0.4}
        return summed_losses(Outputs(hidden), said, labels, mask, weights, settings)[0]

    hidden = student.clone().requires_grad_()
    found = total(hidden, buckets)
    (gradient,) = torch.autograd.grad(found, hidden)
    by_autograd = student.clone().requires_grad_()
    q, p = outcomes(by_autograd, buckets.ids), buckets.log_probs.exp()
    m = {"skewed_kl": 0.2 * p + 0.8 * q, "skewed_reverse_kl": 0.8 * p + 0.2 * q, "jsd": 0.3 * p + 0.7 * q}
    value = {
        "forward_kl": lambda: p * (p / q).log(),
        "reverse_kl": lambda: q * (q / p).log(),
        "skewed_kl": lambda: p * (p / m["skewed_kl"]).log(),
        "skewed_reverse_kl": lambda: q * (q / m["skewed_reverse_kl"]).log(),
        "jsd": lambda: 0.3 * p * (p / m["jsd"]).log() + 0.7 * q * (q / m["jsd"]).log(),
        "total_variation": lambda: 0.5 * (p - q).abs(),
    }[name]().sum(-1)
    nll = -by_autograd.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    expected = ((value + 0.4 * nll) * mask).sum()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient, by_autograd.grad, rtol=1e-7, atol=1e-9)
    assert found.item() <= total(student, Outputs(teacher)).item() + 1e-9, "never more than over the vocabulary"


def test_telling_of_every_id_is_the_teacher_itself():
    student, teacher, _ = told()
    ids = torch.arange(VOCAB - 1).expand(2, 3, -1)
    buckets = Buckets(ids, outcomes(teacher, ids).log())
    labels = torch.zeros(2, 3, dtype=torch.int64)
    for name in ("forward_kl", "jsd"):
        losses = [
            summed_losses(Outputs(student), said, labels, torch.ones(2, 3), {name: 1.0})[0]
            for said in (buckets, Outputs(teacher))
        ]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)


# --- a server that answers as it is told ------------------------------------------------------------------------------


def good(body):
    """What a server of three tokens' log-probabilities says."""
    top = {"token_id:1": -0.5, "token_id:2": -1.5, "token_id:99": -3.0}
    ids = [*body["prompt"], 7]
    return {
        "choices": [
            {"logprobs": {"tokens": [f"token_id:{i}" for i in ids], "top_logprobs": [None, *[top] * (len(ids) - 1)]}}
        ]
    }


@contextmanager
def server(answer):
    """``answer`` gives status and body for the number of a request, its JSON and its headers."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body, dict(self.headers)))
            status, said = answer(len(asked), body, self.headers)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            if status in (301, 307):
                self.send_header("location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/v1", asked
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def asking(url, **spec):
    return ServedTeacher(ServedSpec(**{"url": url, "top_logprobs": 3, "timeout_s": 5.0, **spec}), "m", 50)


IDS = torch.tensor([[3, 4, 5, 6]])


def test_each_document_is_asked_for_and_padding_goes_to_the_rest():
    with server(lambda n, body, headers: (200, good(body))) as (url, asked):
        said = asking(url).teach(
            torch.tensor([[3, 4, 5, 6], [8, 9, 3, 1]]), None, torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
        )
    assert sorted(body["prompt"] for _, body, _ in asked) == [[3, 4], [5, 6], [8, 9, 3, 1]]
    path, body, headers = asked[0]
    assert path == "/v1/completions" and body["echo"] and body["logprobs"] == 3 and body["model"] == "m"
    assert not any(name.lower() == "authorization" for name in headers)
    p = said.log_probs.exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4), rtol=0, atol=1e-5)
    for row, place in [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]:
        assert said.ids[row, place].tolist()[:2] == [1, 2] and said.ids[row, place, 2] < 50
        assert p[row, place, :3].tolist() == pytest.approx([0.6065, 0.2231, 0.0], abs=1e-4)
        assert len(set(said.ids[row, place].tolist())) == 3


def change(**changes):
    def of(n, body, headers):
        whole = good(body)
        whole["choices"][0]["logprobs"] |= {name: value(body) for name, value in changes.items()}
        return 200, whole

    return of


def places(place):
    return change(top_logprobs=lambda body: [None, *[place] * len(body["prompt"])])


def names(*tokens):
    return change(tokens=lambda body: list(tokens))


FAULTS = {
    "has no log-probabilities of the prompt": lambda n, b, h: (200, {"choices": [{"text": "x", "logprobs": None}]}),
    "has no log-probabilities": lambda n, b, h: (200, []),
    "its answer is no JSON": lambda n, b, h: (200, b"<html>"),
    "reads the text as other tokens: id 5 was sent, it has 9": names(
        "token_id:3", "token_id:4", "token_id:9", "token_id:6"
    ),
    "id 6 was sent, it has none": names("token_id:3", "token_id:4", "token_id:5"),
    r"tells tokens as texts, not by their ids \('def'\)": names("def", " f", "(", "x"),
    "it told of 2 of 4 tokens": change(top_logprobs=lambda b: [None, {}]),
    "gives 2 log-probabilities of a token, not 3.*Lower teacher.served.top_logprobs": places(
        {"token_id:1": -1.0, "token_id:2": -2.0}
    ),
    "are no log-probabilities": places({"token_id:1": "x", "token_id:2": -2.0, "token_id:3": -2.0}),
    r"are no log-probabilities\.": places({"token_id:1": 0.7, "token_id:2": -2.0, "token_id:3": -2.0}),
    "add up to more than one": places({"token_id:1": -0.1, "token_id:2": -0.1, "token_id:3": -0.1}),
    "it answers 400 echo is not served": lambda n, b, h: (400, {"error": {"message": "echo is not\nserved"}}),
    "it answers 401.*key_variable": lambda n, b, h: (401, {"error": {"message": "no key"}}),
    "it answers 404 no such model": lambda n, b, h: (404, {"error": {"message": "no such model"}}),
    "it answers 307": lambda n, b, h: (307, {}),
}


def test_a_token_that_cannot_be_has_no_probability_and_no_infinite_loss():
    with server(places({"token_id:1": -0.7, "token_id:2": -0.9, "token_id:3": -math.inf})) as (url, _):
        said = asking(url).teach(IDS, None)
    assert said.log_probs.isfinite().all() and said.log_probs[0, 0, 2].exp() == 0


@pytest.mark.parametrize("words", FAULTS)
def test_answers_that_are_of_no_use(words):
    with server(FAULTS[words]) as (url, asked), pytest.raises(EdgekdError, match=words) as raised:
        asking(url).teach(IDS, None)
    assert url in str(raised.value) and "\n" not in str(raised.value) and len(asked) == 1


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr("edgekd.distill.served._PAUSES_S", (0.0, 0.0))


def test_a_busy_server_is_asked_again(hasty):
    with server(lambda n, body, headers: (200, good(body)) if n == 3 else (503, {})) as (url, asked):
        asking(url).teach(IDS, None)
    assert len(asked) == 3
    with server(lambda n, body, headers: (503, {})) as (url, asked), pytest.raises(EdgekdError, match="answers 503"):
        asking(url).teach(IDS, None)
    assert len(asked) == 3


def test_nobody_there_and_no_answer_in_time(hasty):
    with server(lambda n, body, headers: (200, {})) as (url, _):
        pass
    with pytest.raises(EdgekdError, match="cannot be reached"):
        asking(url).teach(IDS, None)
    held = threading.Event()

    def wait(n, body, headers):
        held.wait(10)
        return 200, {}

    with server(wait) as (url, _):
        with pytest.raises(EdgekdError, match=r"no answer in 0.2 s.*timeout_s"):
            asking(url, timeout_s=0.2).teach(IDS, None)
        held.set()


def test_the_key_is_the_environments(monkeypatch):
    with server(lambda n, body, headers: (200, good(body))) as (url, asked):
        with pytest.raises(SpecError, match="the environment has no TEACHER_KEY"):
            asking(url, key_variable="TEACHER_KEY").teach(IDS, None)
        monkeypatch.setenv("TEACHER_KEY", " secret\n")
        asking(url, key_variable="TEACHER_KEY").teach(IDS, None)
    headers = {name.lower(): value for name, value in asked[-1][2].items()}
    assert len(asked) == 1 and headers["authorization"] == "Bearer secret"


# --- our own server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tiny_gguf):
    """The tiny teacher's artifact behind ``edgekd serve``, and its name there."""
    pytest.importorskip("uvicorn")
    from edgekd.manifest import load_artifact
    from edgekd.serve.server import listen, make_server, served_from
    from edgekd.targets import open_artifact

    artifact = load_artifact(tiny_gguf.folder)
    session, ready, address = open_artifact(artifact, threads=1), threading.Event(), []
    what = served_from(artifact, session)
    with listen("127.0.0.1", 0) as taken:
        running = make_server(what, None, taken, lambda url, model: (address.extend((f"{url}/v1", model)), ready.set()))
        thread = threading.Thread(target=running.run, args=([taken],))
        thread.start()
        assert ready.wait(20)
        yield address
        running.should_exit = True
        thread.join()
        what.worker.close()
        session.close()


def test_what_our_server_tells_is_the_model(served, tiny_teacher):
    url, model = served
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20).expand(3, 20).clone()
    positions[1, 11:] -= 11
    said = ServedTeacher(ServedSpec(url=url, top_logprobs=12), model, 320).teach(ids, None, positions)
    exact = OnlineTeacher(load_model(tiny_teacher), 320).teach(ids, None, positions).rows(torch.arange(60)).softmax(-1)
    exact = outcomes(exact.log().view(3, 20, 320), said.ids)
    learned = torch.ones(3, 20, dtype=torch.bool)
    learned[:, -1] = learned[1, 10] = False
    torch.testing.assert_close(said.log_probs.exp()[learned], exact[learned], rtol=0.02, atol=1e-4)


def test_a_student_is_distilled_from_our_server(served, tiny_teacher, tmp_path):
    from test_cli import edgekd

    from edgekd.distill.checkpoint import read_log

    url, model = served
    shutil.copytree(tiny_teacher, tmp_path / "student")
    untaught = load_model(tiny_teacher)
    with torch.no_grad():
        untaught.get_input_embeddings().weight.mul_(10)  # sure of what the teacher is not
    untaught.save_pretrained(tmp_path / "student")
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    spec = {
        "name": "tiny",
        "teacher": {"model": model, "served": {"url": url, "top_logprobs": 20}},
        "student": {"init": "checkpoint", "model": "student"},
        "data": {"source": "text", "paths": ["text/*.txt"], "context": 32, "validation_share": 0.2, "test_share": 0.2},
        "distill": {
            "loss": {"forward_kl": 1.0},
            "steps": 12,
            "batch_size": 4,
            "warmup_steps": 1,
            "learning_rate": 2e-2,
        },
        "targets": [{"target": "gguf", "recipes": ["fp16"]}],
        "verify": {"windows": 1, "context": 32, "greedy_tokens": 2},
        "bench": {"prompt_tokens": [8], "decode_tokens": 2, "runs": 1},
    }
    spec["distill"]["baseline"] = False
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    done = edgekd("distill", "spec.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    quality = json.loads(done.stdout)["quality"]
    assert quality["teacher"] is None and quality["student"]["kl_to_teacher"] is None
    (log,) = (tmp_path / "runs" / "tiny").glob(".edgekd/student-*/log.jsonl")
    losses = [event.figures["loss"] for event in read_log(log) if event.event == "step"]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]


BASE = {
    "name": "a",
    "student": {"init": "checkpoint", "model": "x"},
    "data": {"source": "stdlib"},
    "teacher": {"model": "m", "served": {"url": "http://127.0.0.1:8000/v1"}},
    "targets": [{"target": "gguf", "recipes": ["fp16"]}],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": {"init": "cut", "layers": 2}}, "student is a checkpoint"),
        ({"distill": {"temperature": 2.0}}, "temperature 1"),
        ({"distill": {"match": {}}}, "inside of its model"),
        ({"quantize": {"qad": {"teacher": "teacher"}}}, "teaches the student alone"),
        ({"teacher": BASE["teacher"] | {"more": [{"model": "y"}]}}, "stands alone"),
        ({"teacher": BASE["teacher"] | {"signal": "cached"}}, "as the training goes"),
        ({"teacher": BASE["teacher"] | {"weights": "int4"}}, "has the weights that it has"),
        ({"teacher": {"model": "m", "served": {"url": "ftp://x"}}}, "pattern"),
        ({"teacher": {"model": "m", "served": {"url": "http://user:pass@host/v1"}}}, "pattern"),
        ({"teacher": {"model": "m", "served": {"url": "http://h:99999/v1"}}}, "Port out of range"),
        ({"teacher": {"model": "m", "served": {"url": "http://h:0x50/v1"}}}, "[Pp]ort"),
        ({"teacher": {"model": "m", "served": {"url": "http://[::/v1"}}}, "Invalid IPv6"),
        ({"teacher": {"model": "m", "served": {"url": "http://:80/v1"}}}, "no host"),
        ({"teacher": {"model": "m", "served": {"url": "http://h/v1", "key_variable": "sk-123"}}}, "pattern"),
    ],
)
def test_mistakes_are_named(change, words):
    Spec.model_validate(BASE)
    with pytest.raises(ValidationError, match=words):
        Spec.model_validate(BASE | change)

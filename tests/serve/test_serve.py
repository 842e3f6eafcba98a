"""``edgekd serve`` by the client that it is made for, over a session that says what it is told and over an artifact."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from edgekd import targets
from edgekd.conversation import chat_ids, render_chat, text_ids
from edgekd.errors import EdgekdError
from edgekd.generation import Generator
from edgekd.manifest import Contract, load_artifact
from scripted import END, Scripted

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from edgekd.serve.app import MOST_BODY_BYTES, Served  # noqa: E402 - both need the extra
from edgekd.serve.grammar import Grammars  # noqa: E402
from edgekd.serve.server import check_access, listen, make_server  # noqa: E402
from edgekd.serve.worker import Worker  # noqa: E402

TEMPLATE = (
    "{% if tools %}T{{ tools[0].function.name }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' and not m.content %}{{ raise_exception('An empty result') }}"
    "{% endif %}[{{ m.role[0] }}]{{ m.content or m.tool_calls[0].function.arguments.x }}\n{% endfor %}[a]"
)
CONTRACT = Contract(
    context_length=200,
    vocab_size=128,
    bos_id=2,
    eos_ids=[END],
    add_bos=True,
    chat_template=TEMPLATE,
    special_tokens={},
    special_ids={"</s>": END},
)
HI = [{"role": "user", "content": "hi"}]


class At(NamedTuple):
    """A server, and what it serves."""

    url: str
    session: Scripted
    client: Any

    def send(
        self, body: Any, path: str = "/v1/chat/completions", method: str = "POST", **headers: str
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text) if "json" in (answer.getheader("content-type") or "") else text

    def health(self) -> Any:
        return self.send(b"", "/health", "GET")[1]


@contextmanager
def serving(session: Any = None, contract: Contract = CONTRACT, key: str | None = None) -> Iterator[At]:
    session = session or Scripted(lambda prompt: "Hello, world.", context_length=200)
    worker = Worker(Generator(session, contract.eos_ids))
    served = Served(session, contract, "tiny", "fp_1", worker, Grammars(session, contract), 0)
    ready: list[str] = []
    with listen("127.0.0.1", 0) as taken:
        server = make_server(served, key, taken, lambda url, model: ready.append(url))
        thread = threading.Thread(target=server.run, args=([taken],))
        thread.start()
        try:
            until(lambda: bool(ready))
            client = openai.OpenAI(base_url=f"{ready[0]}/v1", api_key=key or "none", max_retries=0, timeout=30)
            yield At(ready[0], session, client)
        finally:
            server.should_exit = True
            session.held.set()
            thread.join()
            worker.close()


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def at() -> Iterator[At]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> None:
    if "at" in request.fixturenames:
        session = request.getfixturevalue("at").session
        session.answer, session.pace = lambda prompt: "Hello, world.", 0.0
        session.given.clear()


def ask(at: At, **options: Any) -> Any:
    return at.client.chat.completions.create(model="tiny", **{"messages": HI, "temperature": 0, **options})


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered(at: At) -> None:
    answer = ask(at)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("Hello, world.", "stop")
    assert at.session.given == ["[u]hi\n[a]"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 13, 22)
    assert answer.system_fingerprint == "fp_1" and answer.model == "tiny" and answer.id.startswith("chatcmpl-")
    assert ask(at, max_tokens=5).choices[0].finish_reason == "length"
    assert ask(at, max_completion_tokens=5).choices[0].message.content == "Hello"


def test_a_stream_is_the_same_answer(at: At) -> None:
    chunks = list(ask(at, stream=True, stream_options={"include_usage": True}, seed=1))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, world."
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 13
    assert len({chunk.id for chunk in chunks}) == 1
    assert not any(chunk.usage for chunk in ask(at, stream=True))
    status, raw = at.send({"messages": HI, "stream": True})
    lines = [line for line in raw.decode().split("\n\n") if line]
    assert status == 200 and lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


def test_an_async_client_and_the_helper_for_streams(at: At) -> None:
    import asyncio

    async def stream() -> str:
        async with openai.AsyncOpenAI(base_url=f"{at.url}/v1", api_key="none") as client:
            given: Any = {"model": "tiny", "messages": HI, "temperature": 0}
            async with client.chat.completions.stream(**given) as events:
                return (await events.get_final_completion()).choices[0].message.content or ""

    assert asyncio.run(stream()) == "Hello, world."


def test_a_text_is_completed(at: At) -> None:
    answer = at.client.completions.create(model="tiny", prompt="Once", temperature=0)
    assert answer.choices[0].text == "Hello, world." and at.session.given[-1] == "\x02Once"
    assert answer.usage.prompt_tokens == 5
    for prompt in (["Once"], [2, *b"Once"]):
        again = at.client.completions.create(model="tiny", prompt=prompt, temperature=0)
        assert again.choices[0].text == "Hello, world." and again.usage.prompt_tokens == 5
    chunks = at.client.completions.create(model="tiny", prompt="Once", temperature=0, stream=True, max_tokens=5)
    texts, reasons = zip(*((chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks), strict=True)
    assert "".join(texts) == "Hello" and reasons[-1] == "length"
    assert at.client.completions.create(model="tiny", prompt="x" * 50).usage.completion_tokens <= 16


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_it(at: At, stream: bool) -> None:
    answer = ask(at, stop=[", w", "!"], stream=stream)
    if not stream:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "stop")
        return
    chunks = list(answer)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_what_a_template_is_told(at: At) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 5}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    ask(at, messages=messages, tools=tools, tool_choice="auto", n=1, user="me")
    assert at.session.given[-1] == "Tf[s]Be brief.\n[u]ab\n[a]5\n[t]7\n[a]"
    ask(at, messages=messages[:2], tools=tools, tool_choice="none")
    assert at.session.given[-1] == "[s]Be brief.\n[u]ab\n[a]"


def test_what_was_read_of_a_chat_is_kept_but_not_for_a_seed(at: At) -> None:
    first = ask(at).choices[0].message.content
    chat = [*HI, {"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
    for options, kept in (({}, 22), ({"seed": 4}, 0)):
        ask(at)
        answer = ask(at, messages=chat, **options)
        assert answer.usage.prompt_tokens_details.cached_tokens == kept
        assert at.session.given[-1] == "[u]hi\n[a]Hello, world.\n[u]and?\n[a]"


def test_probabilities(at: At) -> None:
    content = ask(at, logprobs=True, top_logprobs=2, max_tokens=2).choices[0].logprobs.content
    assert [entry.token for entry in content] == ["H", "e"] and content[0].bytes == [72]
    assert [top.token for top in content[0].top_logprobs] == ["H", " "]
    assert content[0].top_logprobs[0].logprob - content[0].top_logprobs[1].logprob == pytest.approx(5)
    streamed = [c.choices[0].logprobs for c in ask(at, logprobs=True, max_tokens=2, stream=True)]
    assert "".join(entry.token for told in streamed if told for entry in told.content) == "He"
    assert ask(at).choices[0].logprobs is None
    given: Any = {"model": "tiny", "prompt": "Once", "temperature": 0}
    told = at.client.completions.create(**given, logprobs=1, max_tokens=3).choices[0].logprobs
    assert told.tokens == ["H", "e", "l"] and told.text_offset == [0, 1, 2]
    assert [list(top) for top in told.top_logprobs] == [["H"], ["e"], ["l"]]


def test_models(at: At) -> None:
    assert [model.id for model in at.client.models.list()] == ["tiny"]
    assert at.client.models.retrieve("tiny").owned_by == "edgekd"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        at.client.models.retrieve("gpt-5")
    assert at.health() == {"status": "ok", "busy": False, "waiting": 0}


# --- many clients -----------------------------------------------------------------------------------------------------


def test_eight_clients_are_answered_in_turn() -> None:
    session = Scripted(lambda prompt: prompt.split("]")[1].split("\n")[0], context_length=200)
    session.held.clear()
    done: list[str] = []

    def client(name: str) -> None:
        done.append(ask(found, messages=[{"role": "user", "content": name}], user=name[0]).choices[0].message.content)

    with serving(session) as found:
        threads = []
        for waiting, name in enumerate(["a1", "a2", "a3", "b1", "c1", "d1", "e1", "f1", "g1", "h1"]):
            threads.append(threading.Thread(target=client, args=(name,)))
            threads[-1].start()  # the first is being answered, and waits for its second token
            until(lambda waiting=waiting: found.health() == {"status": "ok", "busy": True, "waiting": waiting})
        session.held.set()
        for thread in threads:
            thread.join()
    order = [text.split("]")[1].split("\n")[0] for text in session.given]
    assert order == ["a1", "b1", "c1", "d1", "e1", "f1", "g1", "h1", "a2", "a3"]
    assert sorted(done) == sorted(order)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_answer(stream: bool) -> None:
    session = Scripted(lambda prompt: "x" * 150, context_length=200, pace=0.02)
    with serving(session) as found:
        address = found.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as connection:
            body = json.dumps({"messages": HI, "stream": stream}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address[0]}\r\ncontent-type: application/json\r\n"
            connection.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: len(session.fed) > 3)
        until(lambda: not found.health()["busy"], 1.5)
        assert len(session.fed) < 100


def test_one_that_goes_away_while_it_waits_is_not_answered() -> None:
    session = Scripted(lambda prompt: "x" * 5, context_length=200)
    session.held.clear()
    with serving(session) as found:
        first = threading.Thread(target=ask, args=(found,))
        first.start()
        until(lambda: found.health()["busy"])
        with pytest.raises(openai.APITimeoutError):
            ask(found, messages=[{"role": "user", "content": "late"}], timeout=0.3)
        until(lambda: not found.health()["waiting"])
        session.held.set()
        first.join()
        assert ask(found).choices[0].message.content == "xxxxx"
        assert not any("late" in text for text in session.given)


def test_too_many_are_told_to_come_again(at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.serve.worker.MOST_WAITING", 0)
    with pytest.raises(openai.RateLimitError, match="wait already"):
        ask(at)


@pytest.mark.parametrize("stream", [False, True])
def test_a_runtime_that_fails_fails_one_request(at: At, stream: bool) -> None:
    at.session.interrupt = RuntimeError("the runtime gave up")
    with pytest.raises(openai.APIError, match="the runtime gave up") as caught:
        list(ask(at, stream=stream))
    assert "Traceback" not in str(caught.value)
    assert ask(at).choices[0].message.content == "Hello, world."


def test_a_server_that_stops_tells_those_who_wait() -> None:
    session = Scripted(lambda prompt: "x" * 150, context_length=200, pace=0.02)
    said: list[str] = []

    def client() -> None:
        try:
            said.extend(chunk.choices[0].delta.content or "" for chunk in ask(found, stream=True))
        except openai.APIError as error:
            said.append(str(error))

    with serving(session) as found:
        thread = threading.Thread(target=client)
        thread.start()
        until(lambda: len(session.fed) > 5)
    thread.join()
    assert "stopping" in said[-1] and len(session.fed) < 100


# --- bad requests -----------------------------------------------------------------------------------------------------

BAD: list[tuple[Any, int, str | None, str | None]] = [
    (b"", 400, None, None),
    (b"{", 400, None, None),
    (b"[]", 400, None, None),
    (b"\xff\xfe", 400, None, None),
    (b"[" * 100_000, 400, None, None),
    (b'{"messages": [], "temperature": NaN}', 400, "temperature", "invalid_value"),
    ({}, 400, "messages", "missing_required_parameter"),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": "hi"}, 400, "messages", "invalid_value"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "invalid_value"),
    ({"messages": [{"content": "x"}]}, 400, "messages.0.role", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content", "invalid_value"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, None, None),
    ({"messages": HI, "model": "gpt-5"}, 404, "model", "model_not_found"),
    ({"messages": HI, "model": 3}, 400, "model", "invalid_value"),
    ({"messages": HI, "n": 2}, 400, "n", "invalid_value"),
    ({"messages": HI, "temperature": 3}, 400, "temperature", "invalid_value"),
    ({"messages": HI, "temperature": "1"}, 400, "temperature", "invalid_value"),
    ({"messages": HI, "top_p": 0}, 400, "top_p", "invalid_value"),
    ({"messages": HI, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"messages": HI, "max_tokens": 10**40}, 200, None, None),
    ({"messages": HI, "seed": 10**40}, 400, "seed", "invalid_value"),
    ({"messages": HI, "seed": -1}, 200, None, None),
    ({"messages": HI, "stop": ["a"] * 9}, 400, "stop", "invalid_value"),
    ({"messages": HI, "stop": ""}, 400, "stop", "invalid_value"),
    ({"messages": HI, "presence_penalty": 0.5}, 400, "presence_penalty", "invalid_value"),
    ({"messages": HI, "presence_penalty": 0}, 200, None, None),
    ({"messages": HI, "logit_bias": {"5": 1}}, 400, "logit_bias", "invalid_value"),
    ({"messages": HI, "top_logprobs": 50}, 400, "top_logprobs", "invalid_value"),
    ({"messages": HI, "thinking": True}, 400, "thinking", "unknown_parameter"),
    ({"messages": HI, "tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
    ({"messages": HI, "stream": None, "temperature": None, "stop": None, "seed": None}, 200, None, None),
    ({"messages": HI, "response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", None),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "tool", "content": ""}]}, 400, "messages", "invalid_value"),
]


@pytest.mark.parametrize(("body", "status", "param", "code"), BAD, ids=[repr(case[0])[:60] for case in BAD])
def test_a_malformed_request_is_answered_in_openais_form(
    at: At, body: Any, status: int, param: str | None, code: str | None
) -> None:
    got, answer = at.send(body)
    assert got == status, answer
    if status != 200:
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert (error["param"], error["code"]) == (param, code), error
        assert 0 < len(error["message"]) < 400 and "Traceback" not in error["message"]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (["a", "b"], "prompt"),
        ([], "prompt"),
        ([9999], "prompt"),
        ([-1], "prompt"),
        ([[1], [2]], "prompt"),
        ({}, "prompt"),
    ],
)
def test_a_malformed_completion(at: At, prompt: Any, param: str) -> None:
    status, answer = at.send({"prompt": prompt}, "/v1/completions")
    assert status == 400 and answer["error"]["param"] in (param, "messages", f"{param}.0"), answer


def test_other_paths_methods_and_types(at: At) -> None:
    for path, method, status in (("/v1/nothing", "GET", 404), ("/v1/chat/completions", "GET", 405), ("/", "POST", 405)):
        got, answer = at.send(b"", path, method)
        assert got == status and answer["error"]["code"] == "unknown_url", answer
    headers = {"content-type": "text/plain"}
    assert at.send({"messages": HI}, **headers)[0] == 415
    assert at.send(b"x" * (MOST_BODY_BYTES + 1))[0] == 413


def test_a_model_without_a_template_says_so() -> None:
    with serving(contract=CONTRACT.model_copy(update={"chat_template": None})) as found:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            ask(found)
        assert found.client.completions.create(model="tiny", prompt="a", temperature=0).choices[0].text


# --- who may ask ------------------------------------------------------------------------------------------------------


def test_no_other_page_or_name_is_answered(at: At) -> None:
    port = at.url.rpartition(":")[2]
    for headers in ({"host": f"evil.example:{port}"}, {"origin": "http://evil.example"}, {"origin": "null"}):
        status, answer = at.send({"messages": HI}, **headers)
        assert status == 403 and "alone" in answer["error"]["message"]
    assert at.send({"messages": HI}, origin=at.url)[0] == 200
    assert at.send({"messages": HI}, host=f"localhost:{port}")[0] == 200


def test_a_key_is_asked_for() -> None:
    key = "k" * 20
    with serving(key=key) as found:
        assert ask(found).choices[0].message.content == "Hello, world."
        stranger = openai.OpenAI(base_url=f"{found.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            stranger.models.list()
        assert found.send({"messages": HI})[0] == 401
        assert found.health()["status"] == "ok" and found.send(b"", "/", "GET")[0] == 200
        assert found.send({"messages": HI}, authorization=f"Bearer {key}", host="any.name")[0] == 200


@pytest.mark.parametrize(
    ("host", "key", "said"),
    [("0.0.0.0", None, "no key"), ("192.168.1.5", None, "no key"), ("127.0.0.1", "short", "16 or more")],
)
def test_who_may_not_be_let_in(host: str, key: str | None, said: str) -> None:
    with pytest.raises(EdgekdError, match=said):
        check_access(host, key)
    check_access("0.0.0.0", "k" * 16)
    check_access("localhost", None)


def test_a_place_that_cannot_be_had() -> None:
    with listen("127.0.0.1", 0) as taken:
        with pytest.raises(EdgekdError, match="in use"):
            listen("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(EdgekdError, match="Choose another"):
            listen("no.such.name.invalid", 80)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_asks_nobody_else(at: At) -> None:
    connection = http.client.HTTPConnection(at.url.removeprefix("http://"))
    connection.request("GET", "/")
    answer = connection.getresponse()
    text, policy = answer.read().decode(), answer.getheader("content-security-policy") or ""
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert not re.findall(r"(?:src|href)=\"(?!data:,)|https?://|innerHTML|style=", text)


def test_a_browser_shows_the_page(at: At, tmp_path: Path) -> None:
    """The script runs under its own policy, and has asked the server for its model."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("chromium is not installed")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run([browser, *options, "--dump-dom", at.url], capture_output=True, text=True, timeout=120)
    assert '<strong id="model">tiny</strong>' in done.stdout, done.stderr[-2000:]


# --- an artifact ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tiny_gguf: Any) -> Iterator[Any]:
    """A server as a user starts it, and a session of the same artifact beside it."""
    command = [sys.executable, "-c", "from edgekd.cli import main; main()", "serve", tiny_gguf.folder, "--port", "0"]
    process = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    line = process.stderr.readline()
    found = re.match(r"(tiny-gguf-fp16): (http://127\.0\.0\.1:\d+) ", line)
    assert found, line + process.stderr.read()
    session = targets.open_artifact(tiny_gguf, threads=1)
    client = openai.OpenAI(base_url=f"{found[2]}/v1", api_key="none", max_retries=0)
    yield client, session, tiny_gguf.manifest.contract
    session.close()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and time.monotonic() - began < 10
    assert process.stderr.read() == ""


def test_the_server_gives_the_sessions_tokens(served: Any) -> None:
    client, session, contract = served
    chat = [{"role": "user", "content": "def f(x):"}]
    ids = chat_ids(session, contract, render_chat(contract.chat_template, chat, contract.special_tokens))
    for options in ({}, {"seed": 3}, {"seed": 3, "temperature": 1.0}):
        expected = list(session.generate(ids, 40, temperature=options.get("temperature", 0.0), seed=3))
        given: Any = {"temperature": 0, **options, "max_tokens": 40, "logprobs": True}
        answer = client.chat.completions.create(model="tiny-gguf-fp16", messages=chat, **given)
        told = [bytes(entry.bytes) for entry in answer.choices[0].logprobs.content]
        assert told == [session.token_bytes(token) for token in expected]
        assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == len(expected)


def test_the_servers_probabilities_are_the_sessions(served: Any) -> None:
    client, session, contract = served
    given: Any = {"prompt": "import os", "temperature": 0, "max_tokens": 8, "logprobs": 5, "seed": 0}
    told = client.completions.create(model="tiny-gguf-fp16", **given).choices[0].logprobs
    session.reset()
    logits = session.prefill(text_ids(session, contract, "import os"))
    for logprob, top in zip(told.token_logprobs, told.top_logprobs, strict=True):
        shifted = logits.astype(np.float64)
        expected = shifted - np.log(np.exp(shifted - shifted.max()).sum()) - shifted.max()
        assert logprob == pytest.approx(expected.max(), abs=1e-5)
        assert max(top.values()) == pytest.approx(expected.max(), abs=1e-5)
        logits = session.decode(int(expected.argmax()))


def test_a_prompt_is_echoed_with_its_probabilities(served: Any) -> None:
    client, session, contract = served
    text = "import os\nimport sys, re\n"
    ids = text_ids(session, contract, text)
    given: Any = {"prompt": text, "temperature": 0, "max_tokens": 3, "logprobs": 7, "echo": True}
    for _ in range(2):  # the second time the prompt is in the cache
        choice = client.completions.create(model="tiny-gguf-fp16", **given).choices[0]
        told = choice.logprobs
        assert choice.text.startswith(text) and len(told.tokens) == len(ids) + 3
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert "".join(told.tokens) == choice.text and told.text_offset[1] == len(told.tokens[0])
        session.reset()
        logits = session.prefill(ids, all_logits=True).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in range(1, len(ids)):
            assert told.token_logprobs[place] == pytest.approx(expected[place - 1, ids[place]], abs=2e-3)
            assert max(told.top_logprobs[place].values()) == pytest.approx(expected[place - 1].max(), abs=2e-3)
    choice = client.completions.create(
        model="tiny-gguf-fp16", **{**given, "prompt": ids}, extra_body={"return_tokens_as_token_ids": True}
    ).choices[0]
    assert choice.logprobs.tokens[: len(ids)] == [f"token_id:{i}" for i in ids]
    assert all(len(top) == 7 for top in choice.logprobs.top_logprobs[1:])
    without = client.completions.create(model="tiny-gguf-fp16", **{**given, "logprobs": None})
    assert without.choices[0].text == choice.text and without.choices[0].logprobs is None


def test_json_follows_its_schema(served: Any) -> None:
    """A model of random weights writes nothing but it."""
    client, *_ = served
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "kind": {"enum": ["cat", "dög"]},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        },
        "required": ["name", "kind", "sizes"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    for seed in range(3):
        given: Any = {"messages": HI, "response_format": form, "temperature": 1.5, "seed": seed}
        answer = client.chat.completions.create(model="tiny-gguf-fp16", **given)
        assert answer.choices[0].finish_reason == "stop", answer
        made = json.loads(answer.choices[0].message.content)
        assert set(made) == {"name", "kind", "sizes"} and made["kind"] in ("cat", "dög") and len(made["name"]) <= 8
        assert all(0 <= size <= 99 for size in made["sizes"])
    given = {"messages": HI, "response_format": {"type": "json_object"}, "temperature": 0, "max_tokens": 3}
    assert client.chat.completions.create(model="tiny-gguf-fp16", **given).choices[0].message.content[0] == "{"


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"$ref": "#/nowhere"}, {"pattern": "(", "type": "string"}])
def test_a_schema_that_cannot_be_followed(served: Any, schema: Any) -> None:
    client, *_ = served
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="schema") as caught:
        client.chat.completions.create(model="tiny-gguf-fp16", messages=HI, response_format=form)
    assert caught.value.code == "invalid_schema"


def test_what_the_command_refuses(tiny_gguf: Any, tmp_path: Path) -> None:
    def refused(*words: Any) -> str:
        command = [sys.executable, "-c", "from edgekd.cli import main; main()", "serve", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "is not an artifact" in refused(tmp_path)
    assert "no key" in refused(load_artifact(tiny_gguf.folder).folder, "--host", "0.0.0.0")
    assert "not readable" in refused(tiny_gguf.folder, "--key-file", tmp_path / "none")

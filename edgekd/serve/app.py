"""The application: routes, who may ask, and what goes wrong in OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files

from anyio import to_thread
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.datastructures import URL
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..conversation import TemplateRefused, TooLong, chat_ids, check_prompt, render_chat, text_ids
from ..errors import EdgekdError, Fault, as_error
from ..generation import Constraint, Piece
from ..manifest import Contract
from ..session import Session, check_ids
from .grammar import BadGrammar, Grammars
from .replies import DONE, ChatReply, CompletionReply, Reply, error_body, event
from .requests import BadRequest, ChatRequest, CompletionRequest, parse
from .server import LOOPBACK
from .worker import Busy, Job, Worker

MOST_BODY_BYTES = 8 * 2**20
_BETWEEN_CHUNKS_SECONDS = 0.01
"""A small model writes thousands of tokens a second: nobody reads them one by one, and each chunk costs it time."""
_OWN_NAMES = frozenset({*LOOPBACK, "[::1]"})
_LOG = logging.getLogger(__name__)
Asked = CompletionRequest | ChatRequest
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Served:
    """What is served."""

    session: Session
    contract: Contract
    model: str
    """Its name for clients."""
    fingerprint: str
    worker: Worker
    grammars: Grammars
    created: int


class Guard:
    """Who may ask: with a key, whoever has it; without one, programs of this machine and the page that is served here,
    but no other page that a browser shows (by its own origin, or by a name that it has led to this machine)."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refused(Request(scope))):
            return await refused(scope, receive, send)
        await self._app(scope, receive, send)

    def _refused(self, request: Request) -> Response | None:
        if self._key is None:
            return None if _of_this_machine(request) else _error("This server answers its own machine alone.", 403)
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if request.url.path in ("/", "/health") or hmac.compare_digest(given.encode(), self._key.encode()):
            return None
        return _error("Incorrect API key provided.", 401, "authentication_error", code="invalid_api_key")


def _of_this_machine(request: Request) -> bool:
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    return re.sub(r":\d+$", "", host) in _OWN_NAMES and origin in (None, f"http://{host}")


def _error(
    message: str, status: int, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> JSONResponse:
    headers = {"retry-after": "1"} if status == 429 else None
    return JSONResponse(error_body(message, kind, param, code), status, headers)


def _told(error: Exception) -> JSONResponse:
    """What a client is told of an error."""
    match error:
        case BadRequest():
            return _error(str(error), error.status, param=error.param, code=error.code)
        case Busy():
            return _error(str(error), 429, "rate_limit_error", code="rate_limit_exceeded")
        case BadGrammar():
            return _error(str(error), 400, param="response_format", code="invalid_schema")
        case TemplateRefused():
            return _error(str(error), 400, param="messages", code="invalid_value")
        case HTTPException():
            return _error(f"{error.detail}.", error.status_code)
    known = as_error(error)
    if isinstance(known, Fault):
        _LOG.error("a request failed", exc_info=error)
    return _error(str(known), 500, "server_error")


def _safe(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose every error has OpenAI's form."""

    async def safe(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return _told(error)

    return safe


async def _body(request: Request) -> bytes:
    """Raises:
    BadRequest: it is no JSON by its type, which a page elsewhere could send unasked, or too long.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("The body must be of the content type application/json.", status=415)
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MOST_BODY_BYTES:
            raise BadRequest(f"The body is longer than {MOST_BODY_BYTES} bytes.", status=413)
    return b"".join(parts)


# --- the answers ------------------------------------------------------------------------------------------------------


async def _complete(served: Served, request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
    asked = parse(kind, await _body(request))
    if asked.model not in (None, served.model):
        message = f"The model '{asked.model:.100}' does not exist; this server has '{served.model}'."
        raise BadRequest(message, "model", "model_not_found", 404)
    ids, constraint = await to_thread.run_sync(partial(_prepare, served, asked))
    sampling = asked.drawn(served.session.context_length - len(ids) + 1)
    form = ChatReply if isinstance(asked, ChatRequest) else CompletionReply
    wants = sampling.top_logprobs is not None
    reply = form(served.session, served.model, served.fingerprint, len(ids), wants)
    if isinstance(asked, CompletionRequest) and isinstance(reply, CompletionReply):
        reply.tokens_as_ids = bool(asked.return_tokens_as_token_ids)
    job = served.worker.submit(_client(request, asked), Job(ids, sampling, constraint))
    if asked.stream:
        return EventSourceResponse(_events(job, reply, asked.include_usage), sep="\n")
    return JSONResponse(reply.whole(await _whole(job, request)))


def _prepare(served: Served, asked: Asked) -> tuple[list[int], Constraint | None]:
    """A request's ids, and the grammar of its answer; what takes more than a moment."""
    session, contract = served.session, served.contract
    if isinstance(asked, CompletionRequest):
        if isinstance(asked.text, str):
            return _that_fit(session, text_ids(session, contract, _utf8(asked.text)), "prompt"), None
        ids = _that_fit(session, asked.text, "prompt")
        try:
            check_ids(ids, contract.vocab_size)
        except ValueError as error:
            raise BadRequest(f"{error}.", "prompt", "invalid_value") from error
        return ids, None
    if contract.chat_template is None:
        raise BadRequest("This model has no chat template; ask /v1/completions.", "messages")
    messages = [message.plain() for message in asked.messages]
    text = render_chat(contract.chat_template, messages, contract.special_tokens, tools=asked.shown_tools)
    ids = _that_fit(session, chat_ids(session, contract, _utf8(text)), "messages")
    schema = asked.wanted_schema
    return ids, None if schema is None else served.grammars.json(schema)


def _that_fit(session: Session, ids: list[int], param: str) -> list[int]:
    try:
        return check_prompt(session, ids)
    except TooLong as error:
        raise BadRequest(str(error), param, "context_length_exceeded") from error


def _utf8(text: str) -> str:
    """The text, if it is one: JSON can spell half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest("The text holds half a character (a lone surrogate).") from error
    return text


def _client(request: Request, asked: Asked) -> str:
    """Whose turn it is: who the request says it is for, or the connection that it came by."""
    peer = request.client
    return asked.user or (f"{peer.host}:{peer.port}" if peer else "")


async def _events(job: Job, reply: Reply, usage: bool) -> AsyncIterator[bytes]:
    """An answer as it comes; who reads no longer ends it."""
    try:
        for chunk in reply.first(usage):
            yield event(chunk)
        while pieces := await job.take():
            for chunk in reply.chunks(pieces, usage):
                yield event(chunk)
            if pieces[-1].ending:
                yield DONE
                return
            await job.gather(_BETWEEN_CHUNKS_SECONDS)
        yield event(error_body("The server is stopping.", "server_error"))
    except Exception as error:  # the status is sent; the client still learns of it
        yield event(error_body(str(as_error(error)), "server_error"))
    finally:
        job.cancelled = True


async def _whole(job: Job, request: Request) -> list[Piece]:
    """An answer when it is whole, or the client has gone."""
    gone = asyncio.ensure_future(_gone(request))
    pieces: list[Piece] = []
    try:
        while not (pieces and pieces[-1].ending):
            take = asyncio.ensure_future(job.take())
            await asyncio.wait({take, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not take.done():
                take.cancel()
                raise ClientDisconnect
            if not (more := take.result()):
                raise EdgekdError("The server is stopping.")
            pieces += more
        return pieces
    finally:
        job.cancelled = True
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- the rest ---------------------------------------------------------------------------------------------------------


async def _models(served: Served, request: Request) -> Response:
    model = {"id": served.model, "object": "model", "created": served.created, "owned_by": "edgekd"}
    name = request.path_params.get("name")
    if name is None:
        return JSONResponse({"object": "list", "data": [model]})
    if name != served.model:
        raise BadRequest(f"The model '{name:.100}' does not exist.", "model", "model_not_found", 404)
    return JSONResponse(model)


async def _health(served: Served, request: Request) -> Response:
    return JSONResponse({"status": "ok", "busy": served.worker.busy, "waiting": served.worker.waiting})


def _page() -> Endpoint:
    """The chat page: it runs its own script alone, and asks nobody but this server."""
    text = files(__package__).joinpath("page.html").read_text("utf-8")
    policy = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        sha = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        policy.append(f"{name} 'sha256-{sha}'")
    headers = {
        "content-security-policy": "; ".join([*policy, "frame-ancestors 'none'"]),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def page(request: Request) -> Response:
        return HTMLResponse(text, headers=headers)

    return page


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {URL(scope=request.scope).path:.200}"
    return _error(f"{what}: {error.detail}.", error.status_code, code="unknown_url")


def application(served: Served, key: str | None) -> Starlette:
    """The application that serves it.

    Args:
        key: that every request but the page and ``/health`` must bear; None: the machine's own requests alone.
    """

    def route(path: str, method: str, endpoint: Callable[..., Awaitable[Response]], **options: object) -> Route:
        return Route(path, _safe(partial(endpoint, served, **options)), methods=[method])

    return Starlette(
        routes=[
            route("/v1/chat/completions", "POST", _complete, kind=ChatRequest),
            route("/v1/completions", "POST", _complete, kind=CompletionRequest),
            route("/v1/models", "GET", _models),
            route("/v1/models/{name:path}", "GET", _models),
            route("/health", "GET", _health),
            Route("/", _page(), methods=["GET"]),
        ],
        middleware=[Middleware(Guard, key=key)],
        exception_handlers={404: _no_route, 405: _no_route},
    )

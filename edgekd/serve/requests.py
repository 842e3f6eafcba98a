"""What clients may ask for, as OpenAI's interface has it: what is not served is refused by name, never ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..conversation import Message
from ..errors import EdgekdError
from ..files import Json
from ..generation import Sampling

MOST_STOPS = 4
_DEFAULT_COMPLETION = 16  # tokens, as OpenAI's

Zero = Annotated[float, Field(ge=0, le=0)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class BadRequest(EdgekdError):
    """A request that cannot be served as it stands.

    Args:
        param: the key that is wrong.
        code: OpenAI's word for it.
        status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        self.param, self.code, self.status = param, code, status
        super().__init__(message)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Model):
    """What a stream tells besides."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Request(_Model):
    """What both kinds of request have. The keys behind ``stop`` have one value that is served, or say who asks."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None

    @field_validator("temperature", "top_p", "stream", mode="before")
    @classmethod
    def _null_is_the_default(cls, given: object, info: Any) -> object:
        return cls.model_fields[info.field_name].default if given is None else given

    def sampling(self, max_tokens: int, top_logprobs: int | None) -> Sampling:
        """How the answer is drawn."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = None if self.seed is None else self.seed % 2**64
        return Sampling(max_tokens, self.temperature, self.top_p, seed, stops, top_logprobs)

    @property
    def include_usage(self) -> bool:
        """A stream ends in what it used."""
        return self.stream_options is not None and self.stream_options.include_usage


Request = TypeVar("Request", bound=_Request)


class CompletionRequest(_Request):
    """``/v1/completions``."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def text(self) -> str | list[int]:
        """What is gone on with: a text, or ids."""
        match self.prompt:
            case [str(text)]:
                return text
        return self.prompt  # type: ignore[return-value]

    def drawn(self, room: int) -> Sampling:
        """How the answer is drawn that has room for so many tokens."""
        drawn = self.sampling(self.max_tokens or _DEFAULT_COMPLETION, self.logprobs)
        return replace(drawn, echo=bool(self.echo))


class TextPart(_Model):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message; what else it holds, its template may read."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Json] | None = None

    def plain(self) -> Message:
        """As a template reads it: one text, calls' arguments as values, no role that only OpenAI's models know."""
        content = self.content if isinstance(self.content, str | None) else "".join(p.text for p in self.content)
        role = "system" if self.role == "developer" else self.role
        calls = self.tool_calls and [_with_values(call) for call in self.tool_calls]
        return {**(self.model_extra or {}), "role": role, "content": content, "tool_calls": calls or None}


def _with_values(call: Mapping[str, Any]) -> Json:
    """A call whose arguments are no string of JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return dict(call)


class JsonSchema(BaseModel):
    """A schema, and what it is called."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    given: Json = Field(alias="schema")


class ResponseFormat(_Model):
    """What an answer is written in."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(_Request):
    """``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Json] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    modalities: list[Literal["text"]] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    def drawn(self, room: int) -> Sampling:
        """How the answer is drawn that has room for so many tokens."""
        told = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(self.max_completion_tokens or self.max_tokens or room, told)

    @property
    def wanted_schema(self) -> Json | None:
        """That the answer must follow."""
        match self.response_format:
            case ResponseFormat(type="json_object"):
                return {"type": "object"}
            case ResponseFormat(type="json_schema", json_schema=JsonSchema() as wanted):
                return wanted.given
            case ResponseFormat(type="json_schema"):
                raise BadRequest("response_format has no json_schema.", "response_format.json_schema")
        return None

    @property
    def shown_tools(self) -> list[Json] | None:
        """What the template is told of."""
        return None if self.tool_choice == "none" else self.tools or None


def parse(kind: type[Request], body: bytes) -> Request:
    """A request.

    Raises:
        BadRequest: names the first key that is wrong.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is not readable as JSON: {str(error) or 'nested too deep':.200}.") from error
    if not isinstance(value, dict):
        raise BadRequest("The body is no JSON object.")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refused(error) from error


def _refused(error: ValidationError) -> BadRequest:
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a value that may be one thing or another, pydantic tells what is wrong with it as each: the deepest was meant.
    first = max((e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]), key=lambda e: len(e["loc"]))
    param = ".".join(str(part) for part in first["loc"] if not _is_of_pydantic(part))
    if first["type"] == "extra_forbidden":
        return BadRequest(f"Unrecognized request argument supplied: {param}.", param, "unknown_parameter")
    if first["type"] == "missing":
        return BadRequest(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    return BadRequest(f"Invalid value for '{param}': {first['msg']}.", param, "invalid_value")


def _is_of_pydantic(part: int | str) -> bool:
    """Whether a part of a place names one of a value's types, and no key."""
    return isinstance(part, str) and (part in ("str", "int") or not part.isidentifier())

"""The process that renders chat templates for :mod:`edgekd.conversation`: a line of JSON in, a line of JSON out.

Its environment is the one of transformers' ``utils/chat_template_utils.py``, so that a template that works there works
here and gives the same text.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .conversation import MOST_CHARACTERS, MOST_CPU_SECONDS, MOST_MEMORY_BYTES, Span


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, and what it must know of the rendering at work."""

    now: datetime | None = None
    characters = 0
    generated: list[Span]

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: (self.now or datetime.now()).strftime(form),
            "namespace": _Namespace,
        }

    def render_chat(self, template: Template, variables: dict[str, object], now: datetime | None) -> str:
        """The text; ``generated`` then holds the marked characters."""
        self.now, self.characters, self.generated = now, 0, []
        pieces = []
        for piece in template.generate(variables):
            self.characters += len(piece)
            if self.characters > MOST_CHARACTERS:
                raise TemplateError(f"more than {MOST_CHARACTERS:,} characters")
            pieces.append(piece)
        return "".join(pieces)


class _Generation(Extension):
    """``{% generation %}``: what stands inside is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag and its body as a call of :meth:`_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text, environment = caller(), self.environment
        assert isinstance(environment, _Environment)
        environment.generated.append((environment.characters, environment.characters + len(text)))
        return text


class _Namespace(Namespace):
    """A namespace without private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name an attribute "self"
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}, whose name begins with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands; jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    return _Environment().from_string(source)


def _answer(line: bytes) -> bytes:
    try:
        request = json.loads(line)
        now = request["now"] and datetime.fromisoformat(request["now"])
        template = _compiled(request["source"])
        assert isinstance(template.environment, _Environment)
        text = template.environment.render_chat(template, request["variables"], now)
        return json.dumps({"text": text, "generated": template.environment.generated}).encode()
    except TemplateError as error:
        words = str(error)
    except MemoryError:
        words = f"more than {MOST_MEMORY_BYTES // 2**20} MiB of memory"
    except Exception as error:  # a template can raise whatever Python can
        words = f"{type(error).__name__}: {error}"
    return json.dumps({"refused": " ".join(words[:1000].split()).rstrip(".")}).encode()


def _bound() -> Callable[[float], object]:
    """Bound the process's memory; what is returned bounds its CPU seconds from now, 0 for no bound. Windows
    has neither, and is left to the sandbox's own limits."""
    if sys.platform == "win32":
        return lambda seconds: None
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, inside a C function too
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    return lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to answer
    bound = _bound()
    for line in sys.stdin.buffer:
        bound(MOST_CPU_SECONDS)
        answer = _answer(line)
        bound(0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

"""Tokenizer conformance: the runtime's ids against those of the Hugging Face tokenizer, on golden strings and chats.

Every golden string is valid Unicode without lone surrogates, which have no UTF-8 form. NUL is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..conversation import TemplateRefused, chat_ids, render_chat, text_ids
from ..errors import EdgekdError
from ..manifest import Contract
from ..proof import Read, TextKind, TokenCheck, TokenDifference
from ..session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN_DIFFERENCES = 5
_REFUSED = "the template refuses the chat"
_COMBINED_SPECIALS = 4  # Llama 3 has 256 reserved tokens: all stand alone, the first few are also mixed with text

_CODE = (
    'def main(argv: list[str]) -> int:\n    """Run."""\n    return 0 if not argv else 1\n',
    "class A(B, metaclass=M):\n\tx: int = 0\n\n\tdef f(self, *a, **k):\n\t\treturn self.x ** 2 // 3\n",
    "async with aopen(f'{path!r:>10}') as f:\n    async for line in f: print(line, end='')",
    "x = [i for i in range(10) if i % 2 == 0 and i != 4]\n",
    "@decorator\ndef g():\n    yield from (lambda: None,)()\n",
    'raise ValueError(f"bad {x!r}") from None  # noqa: B904',
    "if __name__ == '__main__':\n    sys.exit(main())\n",
    "import os, sys\nfrom . import a as b\n",
    "s = r'\\d+\\.\\w*' + b'\\x00\\xff'.decode('latin-1')",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 1 << 3); return 0; }\n',
    "template <typename T> auto f(T&& t) -> decltype(t.x) { return std::move(t)->y; }",
    'fn main() { let v: Vec<&\'static str> = vec!["a"]; println!("{:?}", v); }',
    "impl<'a, T: ?Sized> Deref for X<'a, T> { type Target = T; }",
    "func (s *Server) Serve(l net.Listener) error {\n\tdefer l.Close()\n\tch <- 1\n}\n",
    "const f = async ({a, ...b}) => { await x?.y ?? `t${a}`; };",
    "interface P<T extends keyof U> { readonly [k: string]: T | undefined }",
    "public static void main(String[] args) throws Exception { int[] a = {1, 2}; }",
    'fun f(x: Int?): String = x?.let { "$it" } ?: "none"',
    "SELECT a.*, COUNT(*) FROM t AS a WHERE x <> 'it''s' GROUP BY 1 -- c\n",
    '#!/bin/bash\nset -euo pipefail\nfor f in *.txt; do echo "${f%.txt}" >&2; done\n',
    '<!DOCTYPE html><p class="a b">&nbsp;&#8364;</p><!-- c -->',
    ".a > .b:not(:hover) { margin: -1.5em auto !important; }",
    '{"a": [1, 2.5e-3, null, true], "b": {"c": "\\u00e9\\n"}}',
    "key: >-\n  folded\n  text\nlist:\n  - a\n  - {b: c}\n",
    "main :: IO ()\nmain = mapM_ print $ filter (\\x -> x > 1) [1..]\n",
    "(defun f (x) `(,x ,@y)) ; c",
    "\\begin{equation} \\frac{a}{b} = \\sum_{i=0}^{n} x_i^2 \\end{equation}",
    "| a | b |\n|---|:-:|\n| `c` | **d** |\n",
    "diff --git a/x b/x\n@@ -1,2 +1,2 @@\n-old\n+new\n",
    "mov eax, [rbp-0x8]\n\tjmp\t.L2\n",
    ">>> f(1)\n... \n[1,2,3][::-1]\n",
    "a+=1;b-=2;c*=3;d/=4;e%=5;f&=6;g|=7;h^=8;i<<=9;j>>=10;k**=11;l//=12",
    "!=====<=>=>>>=...?.::->=>:=&&||!!~~@@##$$%%^^**((([[[{{{}}}]]])))",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case _private __dunder__ x1y2",
)
_PROSE = (
    "The quick brown fox jumps over the lazy dog.",
    "I'm you're he's she'd we'll they've it's don't can't won't y'all'd've",
    "I'M YOU'RE HE'S SHE'D WE'LL THEY'VE IT'S DON'T",
    "I’m you’re it’s don’t — “quoted” ‘single’ …",
    "'s 't 're 've 'm 'll 'd 'S 'T 'x ''s",
    "rock'n'roll o'clock 'tis '90s 5'11\"",
    "https://example.org:8080/a/b%20c?q=1&r=%E2%82%AC#frag",
    "ftp://user:pw@host/ mailto:first.last+tag@example.co.uk //cdn.example/x.js",
    "C:\\Users\\name\\file.txt /usr/lib/x86_64-linux-gnu/libc.so.6 ~/.config",
    "192.168.0.1 ::1 fe80::1%eth0 2001:db8::8a2e:370:7334",
    "2024-02-29T23:59:60Z 12/31/1999 1:2:3.004",
    "v1.2.3-rc.1+build.5 1.0.0 ^2.1 ~=3",
    "$1,234.56 €99,90 £5 ¥1000 100% 1/2 50°C ±3σ",
    "Mr. and Mrs. O'Neill-Smith, Ph.D., e.g. i.e. etc.",
    "ALL CAPS AND MiXeD cAsE",
    "(parentheses) [brackets] {braces} <angles> “quotes” «guillemets» 「かぎ」",
    "one,two;three:four!five?six.seven…eight—nine–ten",
    "!!!??!!... --- ___ *** ### ~~~",
    "word " * 40,
)
_SCRIPTS = (
    "Grüße aus Köln, Straße, ÄÖÜ äöü ß ẞ",
    "Où est l'été? Ça va, naïve façade, œuvre, Ÿ",
    "¿Dónde está el niño? ¡Olé!",
    "Zażółć gęślą jaźń",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "İstanbul'da ışık, ılık, İI iı",
    "Việt Nam đẹp lắm, Nguyễn Huệ",
    "Съешь же ещё этих мягких французских булок",
    "Ґанок їжак єнот",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία, ΣΊΣΥΦΟΣ σίσυφος",
    "שלום עולם, בְּרֵאשִׁית בָּרָא",
    "مرحبا بالعالم، السَّلَامُ عَلَيْكُمْ ٠١٢٣٤٥٦٧٨٩",
    "سلام دنیا، می‌خواهم ۱۲۳",
    "नमस्ते दुनिया, क्षत्रिय श्री १२३",
    "বাংলা ভাষা ১২৩",
    "தமிழ் மொழி",
    "తెలుగు లిపి",
    "ಕನ್ನಡ ಲಿಪಿ മലയാളം",
    "ภาษาไทยไม่มีวรรค กำลังน้ำ ๑๒๓",
    "ພາສາລາວ ភាសាខ្មែរ မြန်မာစာ",
    "བོད་ཡིག་ ᠮᠣᠩᠭᠣᠯ",
    "你好，世界！这是中文。繁體字測試",
    "こんにちは世界、カタカナ ｶﾀｶﾅ ひらがな・々〆",
    "안녕하세요 세계 한국어",
    "ქართული ენა Հայերեն",
    "አማርኛ ትግርኛ",
    "ᚠᚢᚦᚨᚱᚲ ꙮ ⰳ",
    "𐍈𐌰𐌹 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𝒜𝓫𝕔",
    "𠀀𠮷野家 𪚥 㐀",
    "ǅ ǆ Ǆ ﬁ ﬂ ﬃ ĳ Ⅷ ⅷ ① ½ ² ₂ ªº",
    "ＦＵＬＬ　ｗｉｄｔｈ １２３！",
    "mixed日本語andEnglishとкириллицаو عربي",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∑∏∫√∞≈≠≤≥ ←↑→↓⇒⇔",
    "█▓▒░ ┌─┬┐ │├┼┤ ╔═╗ ●○◆◇★☆ ♠♥♦♣ ♩♪♫",
)
_UNICODE_FORMS = (
    "e\u0301 a\u0308 o\u0302\u0323 n\u0303",  # decomposed
    "\u00e9 \u00e4 \u1ed9 \u00f1",  # composed
    "\u212b \u2126 \u212a \u1e9b\u0323",  # singletons that NFC replaces
    "\u1100\u1161\u11a8 \uac01",  # Hangul jamo and syllable
    "\u0958 \u0915\u093c",  # composition exclusion
    "q\u0307\u0323 q\u0323\u0307",  # marks out of canonical order
    "Z\u0351\u036b\u0343a\u0321\u0322l\u0334g\u0489o\u0361",
    "\u0301 at the start",
    "\u0301\u0301\u0301",
    "a\u200bb\u200cc\u200dd\u2060e\ufefff",
    "\ufeffbyte order mark first",
    "soft\u00adhyphen non\u2011breaking",
    "\u202eright to left\u202c \u2066isolate\u2069 \u200f\u200e",
    "\ufffd replacement \ufffe \uffff",
    "private \ue000 \U000f0000 \U0010ffff",
    "tag \U000e0001\U000e0041 variation \u2603\ufe0e \u2603\ufe0f",
    "\u0130\u0131\u017f\u1e9e",
)
_EMOJI = (
    "😀 😂🤣 🥹",
    "👍🏽👍🏿✊🏻",
    "👨‍👩‍👧‍👦",
    "🧑🏽‍🚀 👩‍❤️‍💋‍👨 🏳️‍🌈 🏴‍☠️",
    "🇩🇪🇫🇷🇯🇵 🇺🇳",
    "🇦 🇧🇨",
    "🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "1️⃣ #️⃣ *️⃣",
    "❤️ ❤ ☺︎ ☺️ ™️ ©",
    "text😀text 😀 .😀! 😀\n😀",
    "🫠🫨🪿🩷",
    "\u200d👨 👨\u200d",
)
_NUMBERS = (
    "0",
    "7 42 365 1000 65536 1234567",
    "3.14159265358979323846264338327950288",
    "1e10 -2.5E-3 +0.0 .5 5.",
    "0xDEADbeef 0b1010 0o777 1_000_000 0x1p-3",
    "١٢٣ ۴۵۶ १२३ １２３ ⅔ ²³",
    "a1b22c333d4444",
    "12ab34 1st 2nd 3rd 4x4",
    "00000000001",
    "1,000,000.00 1 000 000",
)
_EDGES = (
    "",
    "a",
    ".",
    "'",
    '"',
    "\\",
    "é",
    "世",
    "😀",
    "\u0301",
    "\u200b",
    "\ufeff",
    "_",
    "▁ ▁▁ a▁b",
    "Ġ ĠĠ Ċ ĉ aĠb",
    "Ã© â‚¬",
    "<0x0A> <0x41>",
    "<s> </s> <unk> <pad> [CLS] [SEP] [MASK] [PAD]",
    "a" * 300,
    "ab" * 200,
    "x_" * 150,
    "é" * 120,
    "世" * 120,
    "😀" * 40,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9wcXJzdHV2d3h5ejAxMjM0NTY3ODkrLw==",
    "d41d8cd98f00b204e9800998ecf8427e e3b0c44298fc1c149afbf4c8996fb924",
)
_SPACES = (
    "\u00a0",
    "\u1680",
    "\u2002",
    "\u2003",
    "\u2009",
    "\u200a",
    "\u202f",
    "\u205f",
    "\u3000",
    "\u2028",
    "\u2029",
    "\u0085",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1f",
)


def _whitespace_strings() -> list[str]:
    """Runs of every kind of white space, alone, leading, trailing and inside."""
    runs = [" " * n for n in (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 32, 33, 64, 100)]
    runs += ["\t" * n for n in (1, 2, 3, 4, 8, 9)] + ["\n" * n for n in (1, 2, 3, 4, 5, 8, 20)]
    runs += [
        "\r",
        "\r\n",
        "\r\n\r\n",
        "\n\r",
        "\r\r",
        " \n",
        "\n ",
        " \t",
        "\t ",
        "\t\n",
        "\n\t",
        " \r\n ",
        "  \n  \n  ",
        " \t \n\t \r\n   \n\n\t\t  ",
        "\n    \n        \n",
    ]
    mixed = ["a \n b", "a\t\tb", "a\r\nb\rc\nd", "a\n\n\nb", "a  b   c    d"]
    placed = [f"a{' ' * n}b" for n in (2, 3, 4, 8, 16)] + [f"{' ' * n}x" for n in (1, 2, 4, 8, 12)]
    placed += [f"x{' ' * n}" for n in (1, 2, 4, 8)] + [f"x\n{' ' * n}y" for n in (1, 2, 3, 4, 8, 12, 16)]
    placed += [
        "  1",
        "1  2",
        " .",
        "  .",
        "...  ",
        "\tx",
        "x\t",
        "\t\t x",
        " \n x",
        ":\n    x",
        "{\n\t\t}",
        ")\n\n\n    (",
        ";  \n",
    ]
    exotic = [f"a{space}b{space}{space}c" for space in _SPACES] + list(_SPACES) + ["".join(_SPACES)]
    return runs + mixed + placed + exotic


def _control_strings() -> list[str]:
    """Control characters, alone in text and in runs."""
    low = [chr(code) for code in range(32) if chr(code) not in "\t\n\r\x0b\x0c"]
    return [
        "a\x00b",
        "\x00",
        "\x00\x00 x",
        "\x1b[31mred\x1b[0m",
        "bell\x07back\b\x7f",
        "".join(low),
        " ".join(low),
        "".join(map(chr, range(0x80, 0xA0))),
        "a\x01 \x02\n\x03",
    ]


def _special_strings(special_tokens: Sequence[str]) -> list[str]:
    """Each special token alone; the first few adjacent, inside text, doubled, and as lookalikes that are plain text."""
    strings = list(special_tokens)
    few = list(special_tokens[:_COMBINED_SPECIALS])
    for token in few:
        strings += [token * 2, f"a{token}b", f" {token} ", f"{token}\n", f"\n\n{token}x", f"  {token}  {token}"]
        strings += [token[:-1], token[1:], token.upper(), f"{token[:2]} {token[2:]}", f"{token[0]}{token}"]
        strings += [f"é{token}世", f"{token}'s", f"x = '{token}'  # {token}"]
    if len(few) > 1:
        strings += ["".join(few), "".join(reversed(few)), f"{few[0]}user\nhi{few[1]}\n{few[0]}"]
    lookalikes = ("<|endoftext|", "|endoftext|>", "< |endoftext|>", "<|im_start|", "<|im_end |>", "＜|im_end|＞", "<|>")
    return [*strings, *lookalikes]


def golden_strings(special_tokens: Sequence[str]) -> list[str]:
    """At least 200 distinct strings that tokenizers are known to disagree on, in a fixed order.

    Args:
        special_tokens: texts of the tokenizer's special tokens.
    """
    digits = ["1234567890"[:n] for n in range(1, 11)] + ["9" * n for n in (11, 12, 13, 20, 33)]
    groups = (_CODE, _PROSE, _SCRIPTS, _UNICODE_FORMS, _EMOJI, _NUMBERS, digits, _EDGES)
    strings = [text for group in groups for text in group]
    strings += _whitespace_strings() + _control_strings() + _special_strings(special_tokens)
    return list(dict.fromkeys(strings))


def golden_chats() -> list[list[dict[str, str]]]:
    """Chats of one to many turns, with and without a system message, and with awkward contents."""

    def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
        head = [] if system is None else [{"role": "system", "content": system}]
        return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]

    return [
        turns("Hello!"),
        turns("Hello!", system="You are a helpful assistant."),
        turns("Write a loop.", "for i in range(3):\n    print(i)\n", "Now in C."),
        turns("1", "2", "3", "4", "5", system="Count."),
        turns(""),
        turns(" leading and trailing \n", system=" "),
        turns("Grüße, 世界 👨‍👩‍👧‍👦 e\u0301", system="Ответь."),
        turns("```python\ndef f():\n\treturn '\\n'\n```\n\n\nWhy?"),
        turns("A question", "An answer that ends in spaces   ", "Thanks\r\n"),
        turns("{{ 7 * 7 }} {% raw %} <b>&amp;</b>"),
    ]


def check_tokens(session: Session, tokenizer: PreTrainedTokenizerFast, contract: Contract) -> TokenCheck:
    """Compare the runtime's tokenizer with the Hugging Face one.

    A text counts as identical when all ids are: nothing in it is a special token, BOS is before it as the tokenizer has
    it. A chat is rendered and tokenized as ``edgekd chat`` does, by the
    contract, and by transformers for the reference; chats that both refuse are counted apart. Round trip: what the
    bytes of the runtime's ids, joined, read as is what the reference tokenizer's decoder makes of the same ids.

    Raises:
        EdgekdError: the contract's template does not end.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    differences: list[TokenDifference] = []

    def compare(kind: TextKind, text: str, expected: Read, runtime: Read) -> bool:
        if expected != runtime and len(differences) < _SHOWN_DIFFERENCES:
            differences.append(TokenDifference(kind=kind, text=text, expected=expected, runtime=runtime))
        return expected == runtime

    # Unigram finds special tokens in text by itself, whatever it is told: such a text says nothing.
    marks = special if type(tokenizer.backend_tokenizer.model).__name__ == "Unigram" else []
    texts = [text for text in golden_strings(special) if not any(token in text for token in marks)]
    ids = [_ids_or_complaint(partial(text_ids, session, contract, text)) for text in texts]
    after = _behind_a_text(tokenizer)
    expected = [tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"] for text in texts]
    expected = [found[: len(found) - after] for found in expected]
    strings = [compare("string", *case) for case in zip(texts, expected, ids, strict=True)]
    given = [_both_chats(session, tokenizer, contract, chat) for chat in _golden_chats_of(tokenizer, contract)]
    chats = [compare("chat", *case) for case in given if case[1:] != (_REFUSED, _REFUSED)]
    reference = _Decoder(tokenizer)
    round_trips = [
        compare("round trip", text, reference.text(got, text, read := _runtime_text(session, got)), read)
        for text, got in zip(texts, ids, strict=True)
        if isinstance(got, list)
    ]
    return TokenCheck(
        differences=differences,
        strings=len(strings),
        strings_identical=sum(strings),
        chats=len(chats),
        chats_identical=sum(chats),
        chats_refused=len(given) - len(chats),
        round_trips=len(round_trips),
        round_trips_identical=sum(round_trips),
    )


def _behind_a_text(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many ids the tokenizer puts behind every text: an EOS, which none to be gone on with has."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    before = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return len(whole) - before - len(bare)


def _ids_or_complaint(give_ids: Callable[[], list[int]]) -> list[int] | str:
    """The runtime's ids, or its complaint, which equals no list."""
    try:
        return [int(token) for token in give_ids()]
    except (EdgekdError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def _runtime_text(session: Session, ids: Sequence[int]) -> str:
    return b"".join(session.token_bytes(token) for token in ids).decode("utf-8", "replace")


class _Decoder:
    """The reference tokenizer's decoder: ids to text, special tokens left out, parts of characters replaced."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        # Behind another token, where no decoder drops the space that a tokenizer put before the text.
        self._before = self._backend.encode("a", add_special_tokens=False).ids

    def text(self, ids: Sequence[int], text: str, given: str) -> str:
        """The text of ids; what the runtime gives where that is the very text they were made of: some decoders, such as
        Metaspace's, spell out the tokens of single bytes.

        Args:
            text: what the ids were made of; a tokenizer may have put a space before it.
        """
        found = self._backend.decode([*self._before, *ids]).removeprefix(self._backend.decode(self._before))
        prefix = " " if found.startswith(" ") and not text.startswith(" ") else ""
        return given if given == prefix + text else found


def _golden_chats_of(tokenizer: PreTrainedTokenizerFast, contract: Contract) -> list[list[dict[str, str]]]:
    return golden_chats() if tokenizer.chat_template or contract.chat_template else []


def _both_chats(
    session: Session, tokenizer: PreTrainedTokenizerFast, contract: Contract, chat: list[dict[str, str]]
) -> tuple[str, list[int] | str, list[int] | str]:
    """A chat's text by the contract, the reference's ids and the runtime's."""
    before = _reference_ids(tokenizer, chat)
    try:
        text = render_chat(contract.chat_template or "", chat, contract.special_tokens)
    except TemplateRefused as refusal:
        return refusal.words, before, _REFUSED
    actual = _ids_or_complaint(partial(chat_ids, session, contract, text))
    # A template may tell the time, which goes on between two renders.
    return text, before if actual == before else _reference_ids(tokenizer, chat), actual


def _reference_ids(tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, str]]) -> list[int] | str:
    from jinja2 import TemplateError

    try:
        return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    except (TemplateError, ValueError, TypeError, KeyError):
        return _REFUSED

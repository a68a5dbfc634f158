"""The events of one JSON text, by ijson on yajl: the judge of what is JSON.

Around it stand the checks it leaves out: yajl takes vertical tabs and form feeds for white space, and an integer that
Python refuses to convert makes ijson go on with an event that holds no object.

One thing is left as yajl has it, in text that no sum is made of: the escape of a high surrogate without its low half
is read as ``?``, the escape of a low one alone is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from decimal import Context, InvalidOperation, getcontext, localcontext
from typing import Any, Final

import ijson

from services.ingest.parsing.trip_file import NUMBER_MAX_DIGITS, FileFault, may_have_long_number

PIECE_BYTES: Final = 64 * 1024
"""What the parser is handed at once: for that long it holds the interpreter."""

_YAJL = ijson.get_backend("yajl2_c")
_FALSE_WHITE_SPACE = re.compile(rb"[\v\f]")
_STRING_OR_LONG_NUMBER = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[0-9]{%d}' % (NUMBER_MAX_DIGITS + 1), re.DOTALL)


def any_exponent() -> AbstractContextManager[Context]:
    """Return the context to read events in: a number whose exponent is beyond any Decimal is JSON all the same."""
    context = getcontext().copy()
    context.traps[InvalidOperation] = False
    return localcontext(context)


def json_events(text: bytes, unfinished: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the events of `basic_parse`: ``("map_key", name)``, ``("number", value)`` and so on.

    If `unfinished`, the text is the beginning of one, and this the reason that there is no more of it.

    Raises `FileFault` for the first thing that is not JSON, or with that reason.
    """
    text, unfinished = _cut_before_what_yajl_may_not_see(text, unfinished)
    try:
        yield from _YAJL.basic_parse(_Pieces(text, unfinished), buf_size=PIECE_BYTES, use_float=False)
    except ijson.JSONError as error:
        raise FileFault(_syntax_reason(error)) from error
    except UnicodeDecodeError as error:
        raise FileFault(f"a string is not Unicode: {error.reason}") from error


class _Pieces:
    """A text as a file to read from. If it is unfinished, reading ends in an error, so the parser sees no end."""

    def __init__(self, text: bytes, unfinished: str | None) -> None:
        self._text = text
        self._unfinished = unfinished
        self._place = 0

    def read(self, size: int) -> bytes:
        piece = self._text[self._place : self._place + size]
        self._place += size
        if size and not piece and self._unfinished is not None:
            raise FileFault(self._unfinished)
        return piece


def _cut_before_what_yajl_may_not_see(text: bytes, unfinished: str | None) -> tuple[bytes, str | None]:
    false_white_space = _FALSE_WHITE_SPACE.search(text)
    if false_white_space:
        text, unfinished = text[: false_white_space.start()], "not JSON: a vertical tab or form feed"
    if may_have_long_number(text):
        for match in _STRING_OR_LONG_NUMBER.finditer(text):
            if not match[0].startswith(b'"'):
                return text[: match.start()], f"a number has more than {NUMBER_MAX_DIGITS} digits in a row"
    return text, unfinished


def _syntax_reason(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    line = (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).partition("\n")[0]
    if "premature EOF" in line:
        return "the file ends inside its document"
    if "trailing garbage" in line:
        return "something follows the document"
    return f"not JSON: {line}"

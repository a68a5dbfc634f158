"""The events of one JSON text, from ijson on yajl, which decides whether the text is JSON.

This module adds two checks that yajl lacks. Yajl accepts vertical tabs and form feeds as white space. If Python
refuses to convert an integer, ijson continues with an event without a value.

One behaviour of yajl stays, because it concerns only text that is not totalled. An escaped high surrogate without its
low half is read as ``?``. An escaped low surrogate alone is refused.
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
"""The size of one call to the parser, which holds the GIL for the whole call."""

_YAJL = ijson.get_backend("yajl2_c")
_FALSE_WHITE_SPACE = re.compile(rb"[\v\f]")
_STRING_OR_LONG_NUMBER = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[0-9]{%d}' % (NUMBER_MAX_DIGITS + 1), re.DOTALL)


def any_exponent() -> AbstractContextManager[Context]:
    """Return a context for reading events, in which a number may have an exponent beyond Decimal's range."""
    context = getcontext().copy()
    context.traps[InvalidOperation] = False
    return localcontext(context)


def json_events(text: bytes, unfinished: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the events of `basic_parse`: ``("map_key", name)``, ``("number", value)`` and so on.

    If `unfinished`, the text is only the beginning of a text, and `unfinished` is the reason why it was cut.

    Raises `FileFault` for the first place that is not JSON, or with that reason.
    """
    text, unfinished = _cut_before_invalid_text(text, unfinished)
    try:
        yield from _YAJL.basic_parse(_Pieces(text, unfinished), buf_size=PIECE_BYTES, use_float=False)
    except ijson.JSONError as error:
        raise FileFault(_syntax_reason(error)) from error
    except UnicodeDecodeError as error:
        raise FileFault(f"a string is not Unicode: {error.reason}") from error


class _Pieces:
    """A text as a readable file. If it is unfinished, the last read raises an error, so the parser sees no end."""

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


def _cut_before_invalid_text(text: bytes, unfinished: str | None) -> tuple[bytes, str | None]:
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

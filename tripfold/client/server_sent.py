"""Reading server-sent events (the WHATWG's HTML standard, 9.2.6), line by line. Pure."""

from __future__ import annotations

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event: its type, its data, and the id that ``Last-Event-ID`` repeats."""

    name: str
    data: str
    id: str


class EventStream:
    """Turns the lines of a stream into events."""

    def __init__(self) -> None:
        self._id = ""
        self._name = ""
        self._data: list[str] = []

    def line(self, line: str) -> Event | None:
        """Take a line, without its end; return the event that it completes, if it does."""
        if line:
            self._field(line)
            return None
        name, data = self._name or "message", self._data
        self._name, self._data = "", []
        return Event(name=name, data="\n".join(data), id=self._id) if data else None

    def _field(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                self._name = value
            case "data":
                self._data.append(value)
            case "id":
                self._id = value
            case _:
                pass  # a comment, which has no name, or a field that says nothing here

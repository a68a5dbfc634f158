"""Checks that a change of the event contract is compatible. Pure.

Old records stay in compacted topics for ever, and consumers upgrade at any time. So a change may only add events, and
fields with defaults. The checks of decoders never change, not even to accept more: a consumer of the previous version
would send the records that it cannot decode to the dead letters. A schema registry checks this too, but would be one
more service to run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from services.api.documentation.asyncapi import Json, asyncapi_document, encode_document
from shared.domain.errors import OperatorError

_ABOUT_ONLY = {"title", "description", "examples", "default"}


class ContractBroken(OperatorError):
    """The event types break the committed contract."""


def write_contract(path: Path) -> None:
    """Write the AsyncAPI document of the types to ``path``. Raises ContractBroken if it breaks the document there."""
    document = asyncapi_document()
    if path.exists():
        broken = breaking_changes(msgspec.json.decode(path.read_bytes()), document)
        if broken:
            raise ContractBroken(
                f"{path} was not changed, because consumers rely on it: {'; '.join(broken)}. Add a new field with a "
                "default, or a new event, instead."
            )
    path.write_bytes(encode_document(document))


def breaking_changes(before: Json, after: Json) -> list[str]:
    """Return a sentence for each change between two AsyncAPI documents that breaks a consumer."""
    broken: list[str] = []
    for name, channel in before["channels"].items():
        broken += _changes_of_channel(name, channel, after["channels"].get(name))
    for name, message in before["components"]["messages"].items():
        now = after["components"]["messages"].get(name)
        if now is None:
            broken.append(f"message {name} is gone")
        elif now["name"] != message["name"]:
            broken.append(f"message {name} has type {now['name']!r} instead of {message['name']!r}")
        elif _key_pattern(now) != _key_pattern(message):
            broken.append(f"message {name} has other keys")
    for name, schema in before["components"]["schemas"].items():
        broken += _changes_of_schema(name, schema, after["components"]["schemas"].get(name))
    return broken


def _changes_of_channel(name: str, before: Json, after: Json | None) -> list[str]:
    if after is None:
        return [f"topic {name} is gone"]
    broken = [
        f"topic {name} no longer holds {message}" for message in before["messages"] if message not in after["messages"]
    ]
    cleanup = [side["bindings"]["kafka"]["topicConfiguration"]["cleanup.policy"] for side in (before, after)]
    if cleanup[0] != cleanup[1]:
        broken.append(f"topic {name} is kept by {cleanup[1]} instead of {cleanup[0]}")
    return broken


def _changes_of_schema(name: str, before: Json, after: Json | None) -> list[str]:
    if after is None:
        return [f"type {name} is gone"]
    known, properties = before.get("properties", {}), after.get("properties", {})
    broken = [f"field {name}.{field} is gone" for field in known if field not in properties]
    broken += [
        f"field {name}.{field} is of another type"
        for field in known
        if field in properties and _checked(known[field]) != _checked(properties[field])
    ]
    required = sorted(set(after.get("required", ())) - set(before.get("required", ())))
    broken += [
        f"field {name}.{field} has no default, and is not in records written before" for field in sorted(required)
    ]
    of_fields = {"properties": None, "required": None}
    if {**_checked(before), **of_fields} != {**_checked(after), **of_fields}:
        broken.append(f"type {name} takes other values")
    return broken


def _checked(schema: Any) -> Any:
    """Return the keywords of a schema that a decoder checks, without its descriptions."""
    if isinstance(schema, dict):
        return {keyword: _checked(value) for keyword, value in schema.items() if keyword not in _ABOUT_ONLY}
    return [_checked(one) for one in schema] if isinstance(schema, list) else schema


def _key_pattern(message: Json) -> object:
    return message.get("bindings", {}).get("kafka", {}).get("key", {}).get("pattern")

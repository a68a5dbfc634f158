"""The AsyncAPI 3.0 document of the topics and events, generated from the types. Pure.

A new field appears in the document by itself. ``docs/asyncapi.json`` is the committed copy. A test compares the two, so
a change of the contract is a visible diff. FastStream's own document describes the subscribers of one process, and
those here take raw records.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from services.api.documentation.examples import CAUSE, EVENTS
from shared.domain.events import (
    EVENT_TYPES,
    CityDayRetracted,
    CityDayStats,
    CountryDayPlanned,
    CountryDaySummary,
    Event,
    headers_of,
)
from shared.domain.schema import SCHEMA_VERSION
from shared.domain.topics import TOPICS, Topic, TopicSpec
from shared.kafka.dead_letters import ERROR_HEADER, ORIGIN_OFFSET_HEADER, ORIGIN_PARTITION_HEADER, ORIGIN_TOPIC_HEADER

Json = dict[str, Any]

BINDING_VERSION = "0.5.0"
DEAD_LETTER = "DeadLetter"

_KEEP_REVISION = (
    "**Keep the record of each key with the highest `revision` (of a plan: `plan_revision`), which may not be the "
    "last.** Records come at least once, and an older one can come after a newer one."
)
_KEEP_VERSION = (
    "**Keep the record of each key with the highest `version`, which may not be the last.** Records come at least "
    "once, and an older one can come after a newer one."
)
_REPLACES = (
    "A `city-day-stats` replaces the former contribution of the city-day, and a `city-day-retracted` removes it from "
    "that country: a sum over all records counts twice."
)
_OWN_USE = "Internal to Tripfold's services; other consumers must not depend on it."

_ABOUT: Mapping[Topic, tuple[str, str]] = {
    Topic.PROCESS_REQUESTS: ("Requested dates", _OWN_USE),
    Topic.CITY_TASKS: ("City-days to fetch", _OWN_USE),
    Topic.BACKGROUND_TASKS: ("City-days of backfills to fetch or to read again", _OWN_USE),
    Topic.RETRIES: ("City-days and requests that wait for their next attempt", _OWN_USE),
    Topic.CITY_STATS: (
        "The contribution of each city-day, and the cities that each country-day expects",
        f"For consumers downstream. {_KEEP_REVISION} {_REPLACES}",
    ),
    Topic.COUNTRY_DAY_SUMMARIES: ("The totals of each country-day", f"For consumers downstream. {_KEEP_VERSION}"),
    Topic.REQUEST_PROGRESS: ("The progress of requests", _OWN_USE),
    Topic.DEAD_LETTERS: (
        "Records that could not be processed",
        "Records of the other topics, unchanged. Additional headers have the origin and the error.",
    ),
}

_DATE_KEY = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_KEY_PATTERNS: Mapping[type[Event], str] = {
    CityDayStats: rf"^{_DATE_KEY}/[a-z0-9-]+/[^/\s+][^/\s]*$",
    CityDayRetracted: rf"^{_DATE_KEY}/[a-z0-9-]+/[^/\s+][^/\s]*$",
    CountryDayPlanned: rf"^{_DATE_KEY}/[a-z0-9-]+(/\+[1-9][0-9]*)?$",
    CountryDaySummary: rf"^{_DATE_KEY}/[a-z0-9-]+$",
}
_PLAN_KEY = "{date}/{country}; further chunks {date}/{country}/+1, …"


def asyncapi_document(*, topic_prefix: str = "") -> Json:
    """Return the AsyncAPI document of all topics and events. ``topic_prefix`` precedes the names of the topics."""
    kinds = [kind for of_topic in EVENT_TYPES.values() for kind in of_topic]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Tripfold events",
            "version": f"{SCHEMA_VERSION}.0.0",
            "description": (
                "The topics of Tripfold and the events in them. A value is JSON, with its type in `type` and the "
                "version of the contract in `schema_version`; headers are CloudEvents 1.0 in binary mode. New fields "
                "may come, with a default; a field is never re-typed or removed: skip fields that you do not know. "
                "The partition is chosen by the first two parts of the key, so all of a country-day is in one "
                "partition. Names of topics carry the prefix of the installation. Sums are integers, delays whole "
                "milliseconds; dates are the upstream's local dates."
            ),
        },
        "defaultContentType": "application/json",
        "channels": {_name_of(spec.topic): _channel(spec, topic_prefix) for spec in TOPICS},
        "operations": {f"send-{_name_of(spec.topic)}": _operation(spec) for spec in sorted(TOPICS, key=_is_internal)},
        "components": {
            "messages": {
                **{kind.__name__: _message(kind) for kind in kinds},
                DEAD_LETTER: _dead_letter(),
            },
            "schemas": {name: _with_markdown_description(schema) for name, schema in sorted(schemas.items())},
            "correlationIds": {
                "request": {
                    "location": "$message.header#/ce_requestid",
                    "description": "The request that caused the event, if one did.",
                }
            },
        },
    }


def encode_document(document: Json) -> bytes:
    """Encode a document as it is committed and served: indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def _name_of(topic: Topic) -> str:
    return topic.value


def _messages_of(topic: Topic) -> Sequence[str]:
    return [kind.__name__ for kind in EVENT_TYPES.get(topic, ())] or [DEAD_LETTER]


def _channel(spec: TopicSpec, topic_prefix: str) -> Json:
    return {
        "address": spec.name(topic_prefix),
        "title": _ABOUT[spec.topic][0],
        "description": _description(spec),
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _messages_of(spec.topic)},
        "bindings": {
            "kafka": {
                "topic": spec.name(topic_prefix),
                "topicConfiguration": {
                    name: [value] if name == "cleanup.policy" else int(value)
                    for name, value in sorted(spec.config.items())
                },
                "bindingVersion": BINDING_VERSION,
            }
        },
    }


def _is_internal(spec: TopicSpec) -> bool:
    return spec.topic not in {Topic.CITY_STATS, Topic.COUNTRY_DAY_SUMMARIES}


def _description(spec: TopicSpec) -> str:
    of_plans = f"; of plans: `{_PLAN_KEY}`" if spec.topic is Topic.CITY_STATS else ""
    return f"{_ABOUT[spec.topic][1]} Key: `{spec.key}`{of_plans}. {_kept(spec)}."


def _kept(spec: TopicSpec) -> str:
    if spec.config["cleanup.policy"] == "compact":
        return "Compacted, kept for ever, without tombstones"
    return f"Deleted after {int(spec.config['retention.ms']) // 86_400_000} days"


def _operation(spec: TopicSpec) -> Json:
    channel = f"#/channels/{_name_of(spec.topic)}"
    return {
        "action": "send",
        "channel": {"$ref": channel},
        "summary": _ABOUT[spec.topic][0],
        "description": _description(spec),
        "messages": [{"$ref": f"{channel}/messages/{name}"} for name in _messages_of(spec.topic)],
    }


def _message(kind: type[Event]) -> Json:
    tag = str(kind.__struct_config__.tag)
    examples = [event for event in EVENTS if type(event) is kind]
    summary, description = _markdown_paragraphs(kind.__doc__ or "")
    key: Json = {"type": "string", "examples": [event.key for event in examples]}
    if kind in _KEY_PATTERNS:
        key["pattern"] = _KEY_PATTERNS[kind]
    return {
        "name": tag,
        "title": kind.__name__,
        "summary": summary,
        **({"description": description} if description else {}),
        "contentType": "application/json",
        "correlationId": {"$ref": "#/components/correlationIds/request"},
        "headers": _headers(kind, tag),
        "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
        "bindings": {"kafka": {"key": key, "bindingVersion": BINDING_VERSION}},
        "examples": [
            {
                "name": tag,
                "headers": {name: value.decode() for name, value in _example_headers(event)},
                "payload": msgspec.to_builtins(event),
            }
            for event in examples
        ],
    }


def _example_headers(event: Event) -> list[tuple[str, bytes]]:
    in_city_stats = event.topic is Topic.CITY_STATS and not isinstance(event, CountryDayPlanned)
    return headers_of(event, source="ingest", cause=CAUSE if in_city_stats else None)


def _headers(kind: type[Event], tag: str) -> Json:
    text: Json = {"type": "string"}
    required = ["ce_specversion", "ce_id", "ce_type", "ce_source", "content-type"]
    properties: Json = {
        "ce_specversion": {"type": "string", "const": "1.0"},
        "ce_id": {**text, "description": "The same whenever the event is published again for the same request."},
        "ce_type": {"type": "string", "pattern": rf"^tripfold\.{tag}\.v[1-9][0-9]*$"},
        "ce_source": {**text, "description": "The service that published the record.", "pattern": "^/tripfold/"},
        "content-type": {"type": "string", "const": "application/json"},
        "ce_requestid": {**text, "description": "The request that caused the event, if one did."},
        "traceparent": {**text, "description": "The trace that the event continues, if traces are on."},
    }
    if "request_id" in kind.__struct_fields__:
        required.append("ce_requestid")
    if kind in {CityDayStats, CityDayRetracted}:
        task = "the task that caused the event, if one did."
        properties["ce_planrevision"] = {**text, "pattern": "^[0-9]+$", "description": f"The plan of {task}"}
        properties["ce_position"] = {**text, "pattern": "^[0-9]+$", "description": f"The place in that plan of {task}"}
    return {"type": "object", "required": required, "properties": properties}


def _dead_letter() -> Json:
    text: Json = {"type": "string"}
    origin = {
        ORIGIN_TOPIC_HEADER: {**text, "enum": [topic.value for topic in Topic if topic is not Topic.DEAD_LETTERS]},
        ORIGIN_PARTITION_HEADER: {**text, "pattern": "^[0-9]+$"},
        ORIGIN_OFFSET_HEADER: {**text, "pattern": "^[0-9]+$"},
        ERROR_HEADER: {**text, "description": "Why the record could not be processed."},
    }
    return {
        "name": "dead-letter",
        "title": DEAD_LETTER,
        "summary": "A record that could not be processed, as it came.",
        "description": "The key and the value are any bytes, or none; the record's own headers come first.",
        "contentType": "application/octet-stream",
        "headers": {"type": "object", "required": list(origin), "properties": origin},
        "payload": {"description": "Whatever the record held."},
        "bindings": {"kafka": {"bindingVersion": BINDING_VERSION}},
    }


def _with_markdown_description(schema: Json) -> Json:
    """Convert the docstring of a schema to Markdown; keep its other keywords."""
    if "description" not in schema:
        return schema
    return {**schema, "description": " ".join(filter(None, _markdown_paragraphs(schema["description"])))}


def _markdown_paragraphs(docstring: str) -> tuple[str, str]:
    """Split a docstring into its first paragraph and the rest, each on one line, as Markdown."""
    first, _, rest = inspect.cleandoc(docstring).replace("``", "`").partition("\n\n")
    return " ".join(first.split()), " ".join(rest.split())

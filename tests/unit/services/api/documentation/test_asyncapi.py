"""The AsyncAPI document: it matches the types, is valid, equals the committed one, and only grows."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from asyncapi3.models import AsyncAPI3
from typer.testing import CliRunner
from yaml import safe_load

from services.api.documentation.asyncapi import DEAD_LETTER, asyncapi_document, encode_document
from services.api.documentation.compatibility import ContractBroken, breaking_changes, write_contract
from services.api.documentation.examples import EVENTS
from shared.domain.events import EVENT_TYPES, Event, decode, encode
from shared.domain.topics import TOPICS, Topic
from tests import ROOT
from tests.fakes.api import Client, World
from tripfold.cli import app

COMMITTED = ROOT / "docs" / "asyncapi.json"
KINDS = [kind for kinds in EVENT_TYPES.values() for kind in kinds]

Document = dict[str, Any]


@pytest.fixture
def document() -> Document:
    """Return the document of the types, as a reader of the JSON has it."""
    read: Document = msgspec.json.decode(encode_document(asyncapi_document()))
    return read


@pytest.fixture
def client() -> Iterator[Client]:
    """Return a client of the API."""
    with World().client() as client:
        yield client


def test_committed_document_is_up_to_date(document: Document) -> None:
    """The committed document equals the one generated from the types."""
    assert msgspec.json.decode(COMMITTED.read_bytes()) == document, (
        "the contract of the events has changed: 'make asyncapi' writes docs/asyncapi.json again, and its diff is what "
        "consumers will see"
    )


def test_contract_only_grows(document: Document) -> None:
    """No type or field of the committed document is missing or of another type; new fields have defaults."""
    assert breaking_changes(msgspec.json.decode(COMMITTED.read_bytes()), document) == []


def test_document_is_valid_asyncapi(document: Document) -> None:
    """The document is valid AsyncAPI 3.0, and every reference in it resolves."""
    AsyncAPI3.model_validate(document)
    for reference in _references(document):
        place: Any = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_event_has_a_decodable_example(document: Document, kind: type[Event]) -> None:
    """Each event is in the channel of its topic, with an example that the strict decoder accepts exactly."""
    channel = document["channels"][kind.topic.value]
    message = document["components"]["messages"][kind.__name__]
    assert channel["messages"][kind.__name__] == {"$ref": f"#/components/messages/{kind.__name__}"}
    assert message["name"] == kind.__struct_config__.tag
    assert message["examples"]
    for example in message["examples"]:
        event = decode(kind.topic, msgspec.json.encode(example["payload"]))
        assert type(event) is kind
        assert msgspec.json.decode(encode(event)) == example["payload"]
        _check(document, message["payload"], example["payload"])
        _check(document, message["headers"], example["headers"])
        assert event.key in message["bindings"]["kafka"]["key"]["examples"]
        assert re.search(message["bindings"]["kafka"]["key"].get("pattern", ""), event.key)


def test_every_example_belongs_to_an_event() -> None:
    """Every example belongs to an event of a topic."""
    assert {type(event) for event in EVENTS} == set(KINDS)


def test_schemas_refuse_invalid_payloads(document: Document) -> None:
    """A payload's schema refuses what the strict decoder refuses, and accepts unknown fields."""
    [example] = document["components"]["messages"]["CityDayStats"]["examples"]
    payload = {"$ref": "#/components/schemas/CityDayStats"}
    _check(document, payload, example["payload"] | {"of_tomorrow": 1})
    for wrong in ({"revision": "7"}, {"revision": 0}, {"country": "Côte"}, {"type": "other"}, {"contribution": None}):
        with pytest.raises(jsonschema.ValidationError):
            _check(document, payload, example["payload"] | wrong)


def test_channels_are_the_provisioned_topics(document: Document) -> None:
    """The channels are the topics, with the settings and keys they are provisioned with."""
    assert list(document["channels"]) == [topic.value for topic in Topic]
    for spec in TOPICS:
        channel = document["channels"][spec.topic.value]
        configured = channel["bindings"]["kafka"]["topicConfiguration"]
        assert configured.pop("cleanup.policy") == [spec.config["cleanup.policy"]]
        assert {name: str(value) for name, value in configured.items()} == {
            name: value for name, value in spec.config.items() if name != "cleanup.policy"
        }
        assert spec.key in channel["description"]
    assert list(document["channels"]["dead-letters"]["messages"]) == [DEAD_LETTER]
    assert "highest `revision`" in document["channels"]["city-stats"]["description"]
    assert "highest `version`" in document["channels"]["country-day-summaries"]["description"]


def test_topic_prefix_is_in_addresses_and_bindings() -> None:
    """The prefix stands before the topics' names, in addresses and bindings alike."""
    channel = asyncapi_document(topic_prefix="eu.")["channels"]["city-stats"]
    assert (channel["address"], channel["bindings"]["kafka"]["topic"]) == ("eu.city-stats", "eu.city-stats")


def _schema(document: Document, name: str) -> Document:
    schema: Document = document["components"]["schemas"][name]
    return schema


def _remove_field(document: Document) -> None:
    del _schema(document, "CityDayStats")["properties"]["sha256"]


def _retype_field(document: Document) -> None:
    _schema(document, "Contribution")["properties"]["trips"] = {"type": "number"}


def _add_required_field(document: Document) -> None:
    schema = _schema(document, "CountryDaySummary")
    schema["properties"]["buses"] = {"type": "integer"}
    schema["required"].append("buses")


def _add_enumerated_value(document: Document) -> None:
    _schema(document, "Outcome")["enum"].append("postponed")


def _remove_event(document: Document) -> None:
    del document["components"]["messages"]["CityFolded"]


def _change_key(document: Document) -> None:
    document["components"]["messages"]["CityDayStats"]["bindings"]["kafka"]["key"]["pattern"] = "^.+$"


def _delete_what_was_kept(document: Document) -> None:
    document["channels"]["city-stats"]["bindings"]["kafka"]["topicConfiguration"]["cleanup.policy"] = ["delete"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_remove_field, "field CityDayStats.sha256 is gone"),
        (_retype_field, "field Contribution.trips is of another type"),
        (_add_required_field, "field CountryDaySummary.buses has no default"),
        (_add_enumerated_value, "type Outcome takes other values"),
        (_remove_event, "message CityFolded is gone"),
        (_change_key, "message CityDayStats has other keys"),
        (_delete_what_was_kept, "topic city-stats is kept by"),
    ],
)
def test_breaking_change_is_named(document: Document, change: Callable[[Document], None], told: str) -> None:
    """A change that breaks a consumer is named."""
    changed = copy.deepcopy(document)
    change(changed)
    [broken] = breaking_changes(document, changed)
    assert broken.startswith(told)


def test_additions_are_not_breaking(document: Document) -> None:
    """A field with a default and new words in a description are not breaking."""
    changed = copy.deepcopy(document)
    schema = _schema(changed, "CityDayStats")
    schema["properties"]["buses"] = {"type": "integer", "default": 0}
    schema["description"] = "In other words."
    assert breaking_changes(document, changed) == []


def test_write_refuses_to_drop_a_field(document: Document, tmp_path: Path) -> None:
    """Writing the contract refuses to drop a field of the file and leaves the file; otherwise it writes it."""
    path = tmp_path / "asyncapi.json"
    _schema(document, "CityDayStats")["properties"]["buses"] = {"type": "integer"}
    path.write_bytes(encode_document(document))
    with pytest.raises(ContractBroken, match=r"field CityDayStats\.buses is gone"):
        write_contract(path)
    assert path.read_bytes() == encode_document(document)
    path.unlink()
    write_contract(path)
    assert path.read_bytes() == COMMITTED.read_bytes()


@pytest.mark.parametrize(("style", "read"), [("json", msgspec.json.decode), ("yaml", safe_load)])
def test_command_prints_json_or_yaml(document: Document, style: str, read: Callable[[str], Document]) -> None:
    """The command prints the document as JSON or as YAML."""
    printed = CliRunner().invoke(app, ["asyncapi", "--format", style])
    assert printed.exit_code == 0
    assert read(printed.stdout) == document


def test_document_is_served_with_its_etag(client: Client, document: Document) -> None:
    """The API serves the document, and responds 304 to a client that has it."""
    response = client.get("/asyncapi.json")
    assert response.headers["content-type"].startswith("application/json")
    assert response.json() == document
    assert client.get("/asyncapi.json", headers={"If-None-Match": response.headers["etag"]}).status_code == 304


def test_event_page_loads_nothing_from_other_hosts(client: Client) -> None:
    """The page of the events loads all its parts from this service, without inline scripts or styles."""
    page = client.get("/asyncapi")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert not re.search(r"<style|<script(?! src=)| style=| on[a-z]+=", page.text)
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"/asyncapi/viewer.js", "/asyncapi.json"} <= set(addresses)
    assert all(address.startswith(("/", "data:")) for address in addresses)
    assert all(client.get(address).status_code == 200 for address in addresses if address.startswith("/"))
    assert "customElements" in client.get("/asyncapi/viewer.js").text


def _check(document: Document, schema: Document, value: object) -> None:
    with_components = {**schema, "components": document["components"]}
    jsonschema.validate(value, with_components, cls=jsonschema.Draft7Validator)


def _references(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for inner in part.values():
            yield from _references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _references(inner)

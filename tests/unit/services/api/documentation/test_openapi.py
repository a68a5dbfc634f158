"""The OpenAPI document: valid, and it describes what the API accepts and returns."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openapi_spec_validator import validate
from typer.testing import CliRunner

from tests.fakes.api import Client, World
from tripfold import cli

PROBLEM = "application/problem+json"


@pytest.fixture(name="document")
def _document(client: Client) -> dict[str, Any]:
    response = client.get("/schema/openapi.json")
    assert response.status_code == 200
    document: dict[str, Any] = response.json()
    return document


def test_document_is_valid_openapi(document: dict[str, Any]) -> None:
    """The document is valid OpenAPI 3.1."""
    assert document["openapi"].startswith("3.1.")
    validate(document)


def test_every_operation_is_documented(document: dict[str, Any]) -> None:
    """Every operation is documented, with a summary and a description."""
    operations = {
        (method, path): operation for path, item in document["paths"].items() for method, operation in item.items()
    }
    assert set(operations) == {
        ("post", "/process-request"),
        ("get", "/process-requests"),
        ("get", "/process-requests/{request_id}"),
        ("delete", "/process-requests/{request_id}"),
        ("get", "/process-requests/{request_id}/events"),
        ("post", "/process-requests/{request_id}/retry"),
        ("post", "/backfills"),
        ("get", "/backfills"),
        ("get", "/backfills/{backfill_id}"),
        ("delete", "/backfills/{backfill_id}"),
        ("get", "/backfills/{backfill_id}/events"),
        ("post", "/backfills/{backfill_id}/pause"),
        ("post", "/backfills/{backfill_id}/resume"),
        ("post", "/backfills/{backfill_id}/retry"),
        ("get", "/schedules"),
        ("get", "/schedules/{name}"),
        ("put", "/schedules/{name}"),
        ("delete", "/schedules/{name}"),
        ("post", "/schedules/{name}/pause"),
        ("post", "/schedules/{name}/resume"),
        ("post", "/schedules/{name}/run"),
        ("get", "/quarantine"),
        ("post", "/quarantine/retry"),
        ("get", "/country-stats"),
        ("get", "/country-stats/{country}/{date}"),
        ("get", "/country-completeness"),
        ("get", "/country-completeness/{country}/{date}"),
        ("get", "/pipeline-status"),
        ("get", "/access"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
        ("get", "/health/serving"),
    }
    assert all(operation["summary"] and operation["description"] for operation in operations.values())


def test_parameters_are_documented_as_the_operation_accepts_them(document: dict[str, Any]) -> None:
    """Parameters are documented as the operation accepts them: ``from`` and ``to`` are required dates."""
    parameters = {
        parameter["name"]: parameter for parameter in document["paths"]["/country-stats"]["get"]["parameters"]
    }
    assert set(parameters) == {"from", "to", "country", "detail"}
    assert [name for name, parameter in parameters.items() if parameter["required"]] == ["from", "to"]
    assert parameters["to"]["schema"]["format"] == "date"
    assert all(parameter["description"] and parameter["examples"] for parameter in parameters.values())


def test_every_error_is_documented_as_a_problem(document: dict[str, Any]) -> None:
    """Every error of an operation is documented as a problem."""
    for path, item in document["paths"].items():
        for operation in item.values():
            errors = {status: response for status, response in operation["responses"].items() if status >= "400"}
            assert {"413", "414", "431"} <= set(errors)
            if path.startswith("/health"):
                continue
            assert {"400", "401", "403", "429", "503"} <= set(errors)
            assert all(set(response["content"]) == {PROBLEM} for response in errors.values()), path


def test_every_problem_has_an_example_of_its_own_status(client: Client, document: dict[str, Any]) -> None:
    """The example of each error has the status of the error, and says what the API says."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            for status, response in operation["responses"].items():
                for example in response.get("content", {}).get(PROBLEM, {}).get("examples", {}).values():
                    assert example["value"]["status"] == int(status), (method, path)
    responses = document["paths"]["/country-stats"]["get"]["responses"]
    for refused in (
        client.get("/country-stats?from=2024-05-02&to=2024-05-01"),
        client.get("/country-stats?from=2024-05-01&to=2024-05-01", headers={"Accept": "image/png"}),
        client.get(f"/country-stats?from={'0' * 40_000}"),
        client.get("/country-stats", headers={"Cookie": "0" * 40_000}),
        client.request("GET", "/country-stats", content=b"0" * 40_000),
    ):
        (example,) = responses[str(refused.status_code)]["content"][PROBLEM]["examples"].values()
        sent = {name: value for name, value in refused.json().items() if name != "http_request_id"}
        if refused.status_code != 406:  # that one lists the formats
            assert sent == example["value"]
        assert sent.keys() == example["value"].keys()


def test_a_value_that_may_be_absent_is_never_null(document: dict[str, Any]) -> None:
    """Parameters have the schema of their values; `detail` is an enum of one value. No union has one member only."""
    schemas = [
        parameter["schema"]
        for item in document["paths"].values()
        for operation in item.values()
        for parameter in operation.get("parameters", ())
    ]
    assert all("null" not in json.dumps(schema) for schema in schemas)
    members = [
        member
        for schema in document["components"]["schemas"].values()
        for member in schema.get("properties", {}).values()
    ]
    assert all(len(member["oneOf"]) > 1 for member in members if "oneOf" in member)
    detail = schema_of(document["paths"]["/country-stats"]["get"], "detail")
    assert (detail["type"], detail["enum"]) == ("string", ["full"])
    assert schema_of(document["paths"]["/backfills"]["post"], "only")["default"] == "missing"


def schema_of(operation: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the schema of a parameter."""
    (schema,) = (one["schema"] for one in operation["parameters"] if one["name"] == name)
    return dict(schema)


def test_every_schema_has_a_name_of_its_own(document: dict[str, Any]) -> None:
    """No two schemas have one name: Litestar would name them by their modules, and generated clients cannot."""
    schemas = document["components"]["schemas"]
    assert {name for name, schema in schemas.items() if schema.get("title", name) != name} == set()


def test_the_command_prints_the_document() -> None:
    """``tripfold openapi`` prints the document of an API that is open to everybody, which is served again and again."""
    printed = json.loads(CliRunner().invoke(cli.app, ["openapi"]).output)
    with World().client() as client:
        for _ in range(2):
            assert printed == client.get("/schema/openapi.json").json()


def test_the_figures_of_a_day_are_documented_as_required(document: dict[str, Any]) -> None:
    """The four figures of a day are required; the details are documented, and optional."""
    day = document["components"]["schemas"]["DayStats"]
    assert set(day["required"]) == {"bus_count", "passenger_count", "exist_accident", "average_delay_s"}
    assert {"complete", "cities_reported", "cities_expected", "version"} <= set(day["properties"])
    content = document["paths"]["/country-stats"]["get"]["responses"]["200"]["content"]["application/json"]
    assert [set(example["value"]) for example in content["examples"].values()] == [{"armenia"}, {"armenia"}]

"""The OpenAPI document: valid, and it describes what the API accepts and returns."""

from __future__ import annotations

from typing import Any

import pytest
from openapi_spec_validator import validate

from tests.fakes.api import Client

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
        ("get", "/process-ranges/{range_id}"),
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
        ("delete", "/process-ranges/{range_id}"),
        ("get", "/country-stats"),
        ("get", "/country-stats/{country}/{date}"),
        ("get", "/country-completeness"),
        ("get", "/country-completeness/{country}/{date}"),
        ("get", "/pipeline-status"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
    }
    assert all(operation["summary"] and operation["description"] for operation in operations.values())
    deprecated = {path for (_, path), operation in operations.items() if operation["deprecated"]}
    assert deprecated == {"/process-ranges/{range_id}"}


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


def test_the_figures_of_a_day_are_documented_as_required(document: dict[str, Any]) -> None:
    """The four figures of a day are required; the details are documented, and optional."""
    day = document["components"]["schemas"]["DayStats"]
    assert set(day["required"]) == {"bus_count", "passenger_count", "exist_accident", "average_delay_s"}
    assert {"complete", "cities_reported", "cities_expected", "version"} <= set(day["properties"])
    content = document["paths"]["/country-stats"]["get"]["responses"]["200"]["content"]["application/json"]
    assert [set(example["value"]) for example in content["examples"].values()] == [{"armenia"}, {"armenia"}]

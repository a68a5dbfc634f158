"""The API conforms to its OpenAPI document: the tests generate requests from the document.

The same requests are made up each time. ``make contract`` makes up many more, of a seed that a failure prints
and that ``make contract SEED=`` repeats.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis.internal.constants_ast import Constants
from schemathesis import GenerationMode
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import positive_data_acceptance
from schemathesis.specs.openapi.schemas import OpenApiSchema

from services.api import auth
from services.api.auth import KEY_HEADER, digest_of, mint_key
from services.api.requests import event_stream
from shared.domain import keys, objects
from shared.domain.backfills import new_backfill
from shared.domain.events import Outcome
from shared.domain.objects import BackfillStatus
from tests.fakes.api import NOW, REQUEST, World, manifest_of, planned, record_of, report_of, stats, write, write_report
from tests.serving import served

USUAL_EXAMPLES = 12
EXAMPLES_MAX = int(os.environ.get("TRIPFOLD_TEST_EXAMPLES", str(USUAL_EXAMPLES)))
SEED = int(os.environ.get("TRIPFOLD_TEST_SEED") or (1 if EXAMPLES_MAX == USUAL_EXAMPLES else random.getrandbits(32)))
TOO_LARGE = ["413", "414", "431"]  # refusals too, of which the checks do not know
TIMEOUT_S = 20
KEY = mint_key()
KEYS = f"test:read+process:{digest_of(KEY)}"
# Those that take a parameter that can be wrong, and those that take none.
FALLIBLE = [
    "/process-request",
    "/process-requests",
    "/backfills",
    "/schedules/{name}",
    "/quarantine",
    "/quarantine/retry",
    "/country-stats",
    "/country-stats/{country}/{date}",
    "/country-completeness",
]
INFALLIBLE = [
    "/process-requests/{request_id}",
    "/process-requests/{request_id}/events",
    "/process-requests/{request_id}/retry",
    "/backfills/{backfill_id}",
    "/backfills/{backfill_id}/events",
    "/backfills/{backfill_id}/pause",
    "/backfills/{backfill_id}/resume",
    "/backfills/{backfill_id}/retry",
    "/schedules",
    "/schedules/{name}/pause",
    "/schedules/{name}/resume",
    "/schedules/{name}/run",
    "/country-completeness/{country}/{date}",
    "/pipeline-status",
    "/access",
    "/health/live",
    "/health/ready",
    "/health/serving",
]
KNOWN = {
    "/process-requests/{request_id}": {"request_id": REQUEST},
    "/process-requests/{request_id}/retry": {"request_id": REQUEST},
    "/process-requests/{request_id}/events": {"request_id": REQUEST},
    "/backfills/{backfill_id}": {"backfill_id": REQUEST},
    "/backfills/{backfill_id}/events": {"backfill_id": REQUEST},
    "/backfills/{backfill_id}/pause": {"backfill_id": REQUEST},
    "/backfills/{backfill_id}/resume": {"backfill_id": REQUEST},
    "/backfills/{backfill_id}/retry": {"backfill_id": REQUEST},
    "/country-stats/{country}/{date}": {"country": "armenia", "date": "2024-05-01"},
}
# No document can say that ``from`` is not after ``to``, that a key was used before, or that no city has failed.
ALLOWED_AND_REFUSED = {
    "/country-stats",
    "/country-completeness",
    "/quarantine",
    "/quarantine/retry",
    "/process-request",
    "/process-requests/{request_id}/retry",
    "/backfills",
    "/schedules/{name}",
}


@pytest.fixture(name="api_schema", scope="module")
def _api_schema() -> Iterator[OpenApiSchema]:
    world = World()
    event = stats("armenia", accidents=1)
    world.fold_in(event, planned("armenia", city_ids=["7", "8"]))
    world.write_manifest(manifest_of(event))
    completed = msgspec.structs.replace(
        record_of(NOW), planned=True, cities=1, countries=1, outcomes={Outcome.STORED: "1"}, served="1"
    )
    write(world, completed)
    write_report(world, report_of("7"))
    write(world, msgspec.structs.replace(completed, request_id=REQUEST))
    backfill = new_backfill(REQUEST, completed.date, completed.date, now=NOW)
    ended = msgspec.structs.replace(backfill, status=BackfillStatus.COMPLETED, cursor=1, completed="1")
    world.store.write(keys.backfill(REQUEST), objects.encode(ended))
    with pytest.MonkeyPatch.context() as patched, contextlib.ExitStack() as stack:
        patched.setattr(event_stream, "WAIT_MAX_S", 0)  # nobody carries these requests out
        patched.setattr(auth, "UNKNOWN_KEYS_PER_MINUTE", 1_000_000)  # a check tries each operation with a wrong key
        # Constants of whatever modules other tests have loaded would make up other requests each time.
        patched.setattr("hypothesis.internal.conjecture.providers._get_local_constants", Constants)
        limits = {"api_access": "keys", "api_keys": KEYS, "api_requests_per_minute": 1_000_000}
        address = stack.enter_context(served(world, **limits))
        schema = schemathesis.openapi.from_url(f"{address}/schema/openapi.json")
        schema.config.checks.negative_data_rejection.expected_statuses += TOO_LARGE
        schema.config.checks.positive_data_acceptance.expected_statuses += TOO_LARGE
        yield schema


@pytest.mark.parametrize("path", FALLIBLE + INFALLIBLE)
def test_documented_requests_get_documented_responses(api_schema: OpenApiSchema, path: str) -> None:
    """Every request that the document allows gets a documented response."""
    without: list[CheckFunction] = [positive_data_acceptance] if path in ALLOWED_AND_REFUSED else []
    try_out(api_schema, path, GenerationMode.POSITIVE, without=without)


@pytest.mark.parametrize("path", FALLIBLE)
def test_undocumented_requests_are_refused(api_schema: OpenApiSchema, path: str) -> None:
    """Every request that the document does not allow is refused as documented."""
    try_out(api_schema, path, GenerationMode.NEGATIVE, without=[])


@pytest.mark.parametrize("path", KNOWN)
def test_existing_resources_get_documented_responses(api_schema: OpenApiSchema, path: str) -> None:
    """The resources of the document's examples get the documented responses when they exist."""
    for method, operation in api_schema[path].items():
        case = operation.Case(path_parameters=KNOWN[path])
        response = case.call_and_validate(headers={KEY_HEADER: KEY}, timeout=TIMEOUT_S)
        assert response.status_code == (200 if method.lower() == "get" else 409)


def try_out(api_schema: OpenApiSchema, path: str, mode: GenerationMode, *, without: list[CheckFunction]) -> None:
    """Generate requests for each operation of a path, and check the responses with all checks but some."""
    for operation in api_schema[path].values():

        @seed(SEED)
        @settings(
            max_examples=EXAMPLES_MAX,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def every_answer(case: schemathesis.Case[Any]) -> None:
            note(f"TRIPFOLD_TEST_EXAMPLES={EXAMPLES_MAX} TRIPFOLD_TEST_SEED={SEED} repeats this")
            case.call_and_validate(headers={KEY_HEADER: KEY}, timeout=TIMEOUT_S, excluded_checks=without)

        every_answer()


def test_every_documented_path_is_tried(api_schema: OpenApiSchema) -> None:
    """The paths under test are exactly those of the document."""
    assert sorted(api_schema) == sorted(FALLIBLE + INFALLIBLE)

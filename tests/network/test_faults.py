"""Faults of the network between Tripfold and what it stands on, made by a proxy that knows neither Kafka nor S3.

Each fault lasts while a date is processed, corrections of its files included. Once it has passed, the request ends
without a failed city, and the oracle, which shares no code with Tripfold, finds that what is stored, logged and served
is the upstream's truth: nothing lost, nothing counted twice, nothing dead-lettered.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.chaos.system import run
from tests.integration.running import ENDED, eventually
from tests.network.conftest import CITIES, Proxied, oracle_arguments
from tests.network.toxiproxy import Toxic

ORACLE = Path(__file__).parents[1] / "chaos" / "oracle.py"
CORRECTIONS = 10
REST_DEADLINE_S = 120.0


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What happens between Tripfold and ``proxy``, for how long; without toxics the proxy is away."""

    name: str
    proxy: str
    toxics: tuple[Toxic, ...] = ()
    lasts_s: float = 6.0


FAULTS = (
    Fault(
        name="S3 resets connections",
        proxy="s3",
        toxics=(Toxic(type="reset_peer", toxicity=0.3, attributes={"timeout": 20}),),
    ),
    Fault(
        name="S3 answers break off",
        proxy="s3",
        toxics=(Toxic(type="limit_data", toxicity=0.3, attributes={"bytes": 700}),),
    ),
    Fault(
        name="requests to S3 break off",
        proxy="s3",
        toxics=(Toxic(type="limit_data", stream="upstream", toxicity=0.3, attributes={"bytes": 1_500}),),
    ),
    Fault(
        name="S3 applies and does not answer",
        proxy="s3",
        toxics=(Toxic(type="timeout", toxicity=0.3, attributes={"timeout": 1_000}),),
    ),
    Fault(
        name="S3 is slow, and comes in small pieces",
        proxy="s3",
        toxics=(
            Toxic(type="latency", attributes={"latency": 300, "jitter": 300}),
            Toxic(type="slicer", attributes={"average_size": 60, "size_variation": 30, "delay": 10}),
        ),
    ),
    Fault(name="S3 is away", proxy="s3", lasts_s=12.0),
    Fault(
        name="Kafka resets connections",
        proxy="kafka",
        toxics=(Toxic(type="reset_peer", toxicity=0.5, attributes={"timeout": 300}),),
    ),
    Fault(
        name="Kafka takes and does not answer",
        proxy="kafka",
        toxics=(Toxic(type="timeout", toxicity=0.5, attributes={"timeout": 3_000}),),
    ),
    Fault(
        name="answers of Kafka break off",
        proxy="kafka",
        toxics=(Toxic(type="limit_data", toxicity=0.5, attributes={"bytes": 3_000}),),
    ),
    Fault(
        name="records to Kafka break off",
        proxy="kafka",
        toxics=(Toxic(type="limit_data", stream="upstream", toxicity=0.5, attributes={"bytes": 3_000}),),
    ),
    Fault(
        name="Kafka is slow",
        proxy="kafka",
        toxics=(Toxic(type="latency", attributes={"latency": 800, "jitter": 700}),),
    ),
    Fault(
        name="Kafka is silent for longer than a session", proxy="kafka", lasts_s=15.0, toxics=(Toxic(type="timeout"),)
    ),
    Fault(name="Kafka is away", proxy="kafka", lasts_s=15.0),
)


@pytest.mark.timeout(420)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_what_passes_during_a_fault_is_exact_when_it_is_over(proxied: Proxied, fault: Fault) -> None:
    """Whatever the network did meanwhile, the date's numbers are the upstream's, everywhere."""
    date = proxied.fresh_date()
    where = await accepted(proxied, date)
    toxiproxy = proxied.toxiproxy
    with toxiproxy.poisoned(fault.proxy, fault.toxics) if fault.toxics else toxiproxy.away(fault.proxy):
        await asyncio.gather(correct(proxied, date, lasts_s=fault.lasts_s), asyncio.sleep(fault.lasts_s))
    assert (await ended(proxied, where))["status"] == "completed"
    # Files were corrected after they had been fetched: once more, with all of it as it is now.
    assert (await ended(proxied, await accepted(proxied, date)))["status"] == "completed"
    code, output = await run(
        *(sys.executable, str(ORACLE), *oracle_arguments(proxied, date)),
        env={**os.environ, "AWS_DEFAULT_REGION": "us-east-1"},
        s=REST_DEADLINE_S,
    )
    assert code == 0, output
    assert json.loads(output)["city_days"] == CITIES


async def correct(proxied: Proxied, date: str, *, lasts_s: float) -> None:
    """Correct files of a date, and ask for it again and again, whether that is heard or not."""
    for _ in range(CORRECTIONS):
        proxied.upstream.correct(date)
        asked = asyncio.create_task(_post(proxied, date))
        await asyncio.sleep(lasts_s / CORRECTIONS)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def accepted(proxied: Proxied, date: str) -> str:
    """Ask for a date until that is heard; return where its progress is."""
    return await eventually(
        lambda: _post(proxied, date), f"a request of {date} to be accepted", deadline_s=REST_DEADLINE_S
    )


async def ended(proxied: Proxied, where: str) -> dict[str, Any]:
    """Wait until a request has ended, whatever the API answers meanwhile."""

    async def look() -> dict[str, Any] | None:
        try:
            answer = await proxied.running.client.get(where)
        except httpx.HTTPError:
            return None
        request: dict[str, Any] = answer.json()
        return request if request.get("status") in ENDED else None

    what = f"{where} to end; logs in {proxied.running.logs}"
    return await eventually(look, what, deadline_s=REST_DEADLINE_S)


async def _post(proxied: Proxied, date: str) -> str | None:
    try:
        answer = await proxied.running.client.post("/process-request", params={"date": date})
    except httpx.HTTPError:
        return None
    return str(answer.headers["location"]) if answer.status_code == 202 else None

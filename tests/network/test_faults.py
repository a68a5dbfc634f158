"""Faults of the network between Tripfold and what it stands on, made by a proxy that knows neither Kafka nor S3.

Each fault lasts while a date is processed, corrections of its files included, and it is asserted that it met Tripfold:
it broke connections that Tripfold held, or a request was taken in while everything was slow. Once it has passed, the
request ends without a failed city, and the oracle, which shares no code with Tripfold, finds that what is stored,
logged and served is the upstream's truth: nothing lost, nothing counted twice, nothing dead-lettered.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import httpx
import pytest

from tests import ROOT
from tests.chaos.system import run
from tests.integration.running import ENDED, eventually
from tests.network.conftest import CITIES, Proxied, oracle_arguments
from tests.network.faults import FAULTS, Fault
from tests.network.wire import is_slow, kafka, s3

ORACLE = ROOT / "tests" / "chaos" / "oracle.py"
CORRECTIONS = 10
BROKEN_DEADLINE_S = 15.0  # the log is written a moment later
CALM_S = 6.0
REST_DEADLINE_S = 180.0  # a consumer that a fault left standing still is started again after more than a minute


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_what_passes_during_a_fault_is_exact_when_it_is_over(proxied: Proxied, fault: Fault) -> None:
    """Whatever the network did meanwhile, the date's numbers are the upstream's, everywhere."""
    date = proxied.fresh_date()
    where = await accepted(proxied, date)
    broken_before = proxied.log.broken(fault.proxy)
    with fault.lasting(proxied.toxiproxy, fault.proxy):
        await asyncio.gather(
            correct(proxied, date, lasts_s=fault.lasts_s, fault=fault), seen_to_be_slow(proxied, fault)
        )
        if not fault.breaks:
            await accepted(proxied, date)
    if fault.breaks:
        await eventually(
            lambda: _broken(proxied, fault.proxy, broken_before),
            "a connection of Tripfold's to be broken",
            deadline_s=BROKEN_DEADLINE_S,
        )
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


async def test_a_calm_network_breaks_nothing(proxied: Proxied) -> None:
    """What the tests above take for a fault's doing does not happen without one."""
    before = {proxy: proxied.log.broken(proxy) for proxy in ("s3", "kafka")}
    date = proxied.fresh_date()
    where = await accepted(proxied, date)
    await correct(proxied, date, lasts_s=CALM_S)
    assert (await ended(proxied, where))["status"] == "completed"
    assert {proxy: proxied.log.broken(proxy) for proxy in before} == before


async def seen_to_be_slow(proxied: Proxied, fault: Fault) -> None:
    """Look, unless the fault breaks connections, whether the way that Tripfold takes is slow."""
    if fault.breaks:
        return
    settings = proxied.running.settings
    if fault.proxy == "kafka":
        await is_slow(kafka(settings.kafka_bootstrap_servers), in_pieces=False)
    else:
        assert settings.s3_endpoint_url is not None
        await is_slow(s3(settings.s3_endpoint_url.removeprefix("http://")), in_pieces=True)


async def correct(proxied: Proxied, date: str, *, lasts_s: float, fault: Fault | None = None) -> None:
    """Correct files of a date, and ask for it again and again, whether that is heard or not.

    If the fault breaks some connections alone, these are drawn again each time.
    """
    asking = []
    for _ in range(CORRECTIONS):
        if fault is not None and fault.drawn_again:
            await asyncio.to_thread(proxied.toxiproxy.draw_again, fault.proxy, fault.toxics)
        proxied.upstream.correct(date)
        asking.append(asyncio.create_task(_post(proxied, date)))
        await asyncio.sleep(lasts_s / CORRECTIONS)
    for one in asking:
        one.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


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


async def _broken(proxied: Proxied, proxy: str, before: int) -> int | None:
    return (await asyncio.to_thread(proxied.log.broken, proxy) - before) or None


async def _post(proxied: Proxied, date: str) -> str | None:
    try:
        answer = await proxied.running.client.post("/process-request", params={"date": date})
    except httpx.HTTPError:
        return None
    return str(answer.headers["location"]) if answer.status_code == 202 else None

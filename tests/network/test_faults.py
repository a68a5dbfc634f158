"""Network faults between Tripfold and its dependencies, injected by a TCP proxy.

Each fault lasts while Tripfold processes a date and its files are corrected. The test checks that the fault met
Tripfold: it broke open connections, or the API accepted a request while the network was slow. After the fault the
request must end without a failed city. Then the oracle, which shares no code with Tripfold, checks that the stored,
published and served sums are the upstream's, and that no record is dead-lettered.
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
from tests.network.wire import assert_slow_responses, kafka, s3

ORACLE = ROOT / "tests" / "chaos" / "oracle.py"
CORRECTIONS = 10
BROKEN_DEADLINE_S = 15.0  # Toxiproxy writes its log with a delay
CALM_S = 6.0
END_DEADLINE_S = 180.0  # a consumer that a fault left hanging is restarted after more than a minute


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_numbers_are_exact_after_a_fault(proxied: Proxied, fault: Fault) -> None:
    """After a network fault the date's numbers are the upstream's in storage, topics and API."""
    date = proxied.fresh_date()
    location = await accepted(proxied, date)
    broken_before = proxied.log.broken(fault.proxy)
    with fault.inject(proxied.toxiproxy, fault.proxy):
        await asyncio.gather(
            correct(proxied, date, duration_s=fault.duration_s, fault=fault), assert_slow(proxied, fault)
        )
        if not fault.breaks:
            await accepted(proxied, date)
    if fault.breaks:
        await eventually(
            lambda: _broken(proxied, fault.proxy, broken_before),
            "the proxy to break a connection of Tripfold",
            deadline_s=BROKEN_DEADLINE_S,
        )
    assert (await ended(proxied, location))["status"] == "completed"
    # Files changed after they were fetched, so request the date again.
    assert (await ended(proxied, await accepted(proxied, date)))["status"] == "completed"
    code, output = await run(
        *(sys.executable, str(ORACLE), *oracle_arguments(proxied, date)),
        env={**os.environ, "AWS_DEFAULT_REGION": "us-east-1"},
        s=END_DEADLINE_S,
    )
    assert code == 0, output
    assert json.loads(output)["city_days"] == CITIES


async def test_a_network_without_faults_breaks_no_connection(proxied: Proxied) -> None:
    """Without a fault the proxy breaks no connection."""
    before = {proxy: proxied.log.broken(proxy) for proxy in ("s3", "kafka")}
    date = proxied.fresh_date()
    location = await accepted(proxied, date)
    await correct(proxied, date, duration_s=CALM_S)
    assert (await ended(proxied, location))["status"] == "completed"
    assert {proxy: proxied.log.broken(proxy) for proxy in before} == before


async def assert_slow(proxied: Proxied, fault: Fault) -> None:
    """Check that Tripfold's connections are slow, unless the fault breaks connections."""
    if fault.breaks:
        return
    settings = proxied.running.settings
    if fault.proxy == "kafka":
        await assert_slow_responses(kafka(settings.kafka_bootstrap_servers), in_pieces=False)
    else:
        assert settings.s3_endpoint_url is not None
        await assert_slow_responses(s3(settings.s3_endpoint_url.removeprefix("http://")), in_pieces=True)


async def correct(proxied: Proxied, date: str, *, duration_s: float, fault: Fault | None = None) -> None:
    """Correct files of a date and request it repeatedly, ignoring errors.

    If the fault breaks only some connections, the proxy selects them again each time.
    """
    posts = []
    for _ in range(CORRECTIONS):
        if fault is not None and fault.can_select_again:
            await asyncio.to_thread(proxied.toxiproxy.select_again, fault.proxy, fault.toxics)
        proxied.upstream.correct(date)
        posts.append(asyncio.create_task(_post(proxied, date)))
        await asyncio.sleep(duration_s / CORRECTIONS)
    for post in posts:
        post.cancel()
    await asyncio.gather(*posts, return_exceptions=True)


async def accepted(proxied: Proxied, date: str) -> str:
    """Request a date until the API accepts it; return the URL of its status."""
    return await eventually(
        lambda: _post(proxied, date), f"a request of {date} to be accepted", deadline_s=END_DEADLINE_S
    )


async def ended(proxied: Proxied, location: str) -> dict[str, Any]:
    """Wait until a request has ended; ignore errors of the API meanwhile."""

    async def look() -> dict[str, Any] | None:
        try:
            response = await proxied.running.client.get(location)
        except httpx.HTTPError:
            return None
        request: dict[str, Any] = response.json()
        return request if request.get("status") in ENDED else None

    what = f"{location} to end; logs in {proxied.running.logs}"
    return await eventually(look, what, deadline_s=END_DEADLINE_S)


async def _broken(proxied: Proxied, proxy: str, before: int) -> int | None:
    return (await asyncio.to_thread(proxied.log.broken, proxy) - before) or None


async def _post(proxied: Proxied, date: str) -> str | None:
    try:
        response = await proxied.running.client.post("/process-request", params={"date": date})
    except httpx.HTTPError:
        return None
    return str(response.headers["location"]) if response.status_code == 202 else None

"""``tripfold up``, as users run it: start it, send requests, stop it, and start it again on the same data."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import httpx
from prometheus_client.parser import text_string_to_metric_families

from shared.runtime.metrics import Part, registry_of
from tests.integration.running import ENDED, eventually, until
from tests.integration.trips import figures_of, make_trips
from tests.integration.upstream import UpstreamServer
from tests.prometheus import run_tool
from tripfold.local.ports import free_port
from tripfold.local.recompute import CountryDay, recompute
from tripfold.local.supervisor import http_probe

DATE = "2024-05-01"
STOP_DEADLINE_S = 60.0


@contextlib.asynccontextmanager
async def up(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run ``tripfold up``; kill it at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tripfold",
        "up",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def processes_of(data_dir: Path) -> list[str]:
    """List the processes whose environment or arguments name a data directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if str(data_dir).encode() in command + (entry / "environ").read_bytes() and entry.name != str(os.getpid()):
                found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


async def scrape(process: asyncio.subprocess.Process) -> dict[str, str]:
    """Return the metrics of each process of a stack, from the addresses that ``up`` prints."""
    assert process.stdout is not None
    printed = b""
    while not printed.startswith(b"metrics "):
        printed = await process.stdout.readline()
    async with httpx.AsyncClient(trust_env=False) as client:
        return {
            name.lower(): (await client.get(url)).text
            for url, name in re.findall(r"(http\S+) \((\w+)\)", printed.decode())
        }


def check_metrics(scraped: dict[str, str]) -> None:
    """Check that each process exports the metrics of its part and no others, under standard names."""
    for text in scraped.values():
        run_tool("promtool", "check", "metrics", text=text)
    names = {name: {family.name for family in text_string_to_metric_families(text)} for name, text in scraped.items()}
    assert names == {part: {family.name for family in registry_of(part).collect()} for part in get_args(Part)}


async def test_up_continues_where_it_stopped(tmp_path: Path) -> None:
    """Dates processed before Ctrl-C are served after the next start, and nothing runs in between.

    After SIGKILL and the loss of all records, up fills the topics, resumes an unfinished request and says so.
    """
    later = "2024-05-02"
    port = free_port("the API of a test")
    ready = http_probe(f"http://127.0.0.1:{port}/health/ready")
    with UpstreamServer() as upstream:
        arguments = ("--upstream", upstream.url, "--data-dir", str(tmp_path / "data"), "--port", str(port))
        upstream.add_city(0, "A", "Peru")
        for date in (DATE, later):
            upstream.put(0, date, make_trips(1, 500, date))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            async with up(*arguments) as process:
                await until(ready, "the stack to be ready")
                place = await _requested(client, DATE)
                assert (await eventually(lambda: _ended(client, place), "the request to end"))["status"] == "completed"
                check_metrics(await scrape(process))
                output = await _interrupted(process)
            assert "Traceback" not in output
            assert processes_of(tmp_path) == []
            async with up(*arguments) as process:
                await until(ready, "the stack to be ready again")
                answer = await client.get("/country-stats", params={"from": DATE, "to": DATE})
                assert answer.json() == {"peru": {DATE: figures_of(make_trips(1, 500, DATE))}}
                assert (await client.get(place)).json()["status"] == "completed"
                upstream.silent = {"/cities/0/stats"}
                place = await _requested(client, later)
                process.kill()
                await process.wait()
            await eventually(partial(_nothing_runs, tmp_path), "the children to end")
            (tmp_path / "data" / "kafka" / "kafka.json").unlink()
            upstream.silent = set()
            async with up(*arguments) as process:
                await until(ready, "the stack to be ready once more")
                assert (await eventually(lambda: _ended(client, place), "the request to end"))["status"] == "completed"
                await _verify_topics(tmp_path / "data")
                output = await _interrupted(process)
    assert "The last stop was not clean" in output
    # The kill may come before or after the second date was planned.
    resumed = r"Published again from the bucket: [34] events of [12] dates, and 1 unfinished requests"
    assert re.search(resumed, output), output


async def _requested(client: httpx.AsyncClient, date: str) -> str:
    return (await client.post("/process-request", params={"date": date})).headers["location"]


async def _interrupted(process: asyncio.subprocess.Process) -> str:
    """Stop ``up`` by Ctrl-C, and return what it printed."""
    process.send_signal(signal.SIGINT)
    output = (await asyncio.wait_for(process.communicate(), STOP_DEADLINE_S))[0].decode()
    assert process.returncode == 0, output
    return output


async def _verify_topics(data_dir: Path) -> None:
    variables = (data_dir / "environment").read_text().replace("export ", "").split()
    verify = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tripfold", "verify", "--topics"),
        env={**os.environ, **dict(one.split("=", 1) for one in variables)},
    )
    assert await verify.wait() == 0


async def _nothing_runs(data_dir: Path) -> bool | None:
    return processes_of(data_dir) == [] or None


async def _ended(client: httpx.AsyncClient, place: str) -> dict[str, Any] | None:
    request: dict[str, Any] = (await client.get(place)).json()
    return request if request["status"] in ENDED else None


async def test_a_taken_port_is_named_without_a_traceback(tmp_path: Path) -> None:
    """The error names a port that another program uses, without a traceback, and no process is left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with up("--data-dir", str(tmp_path / "data"), "--port", str(port)) as process:
            output = (await process.communicate())[0].decode()
    assert process.returncode == 1
    assert f"Port {port} for the API cannot be opened: Address already in use" in output
    assert "Traceback" not in output
    assert processes_of(tmp_path) == []


def test_the_independent_recomputation_matches_figures_worked_out_by_hand() -> None:
    """The demo's independent recomputation gives the figures that can be worked out by hand."""
    trips: list[dict[str, Any]] = [
        {"departure-time": f"{DATE}T00:00:00", "bus-type": "B", "passengers": 3, "delay": "PT1M30S", "accident": False},
        {"departure-time": f"{DATE}T00:00:00", "bus-type": "B", "passengers": 4, "delay": "-PT0.5S", "accident": True},
    ]
    with UpstreamServer() as upstream:
        upstream.add_city(0, "A", "Peru")
        upstream.files["0", DATE] = json.dumps(trips, separators=(",", ":")).encode()
        found = recompute(upstream.url, [dt.date(2024, 5, 1)])
    assert found == {
        ("Peru", DATE): CountryDay(
            buses=2,
            passengers=7,
            accidents=1,
            delay_total_ms=89_500,
            average_delay_ms=44_750,
            exist_accident=True,
        )
    }

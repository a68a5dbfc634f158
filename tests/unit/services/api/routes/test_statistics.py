"""Representations of the statistics: JSON, NDJSON, CSV, compression and ETags."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import itertools
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest

from services.api.middleware import compression
from services.api.routes import statistics
from shared.runtime import zstd
from tests.fakes.api import NOW, Client, World, planned, record_of, stats, write

PARQUET = "application/vnd.apache.parquet"
PATH = "/country-stats?from=2024-05-01&to=2024-05-02"


@pytest.fixture(name="world")
def _world() -> World:
    world = World()
    world.fold_in(stats("armenia", accidents=1), planned("armenia", city_ids=["7"]))
    world.fold_in(stats("belgium", trips=2))
    return world


def test_csv_has_a_header_and_a_line_per_country_day(client: Client) -> None:
    """CSV has a header and a line for each country-day."""
    response = client.get(PATH, headers={"Accept": "text/csv"})
    assert response.headers["content-type"] == "text/csv; header=present; charset=utf-8"
    assert response.text == (
        "country,date,bus_count,passenger_count,exist_accident,average_delay_s\r\n"
        "armenia,2024-05-01,8,40,true,1.125\r\n"
        "armenia,2024-05-02,0,0,false,0.0\r\n"
        "belgium,2024-05-01,2,40,false,4.5\r\n"
        "belgium,2024-05-02,0,0,false,0.0\r\n"
    )


@pytest.mark.parametrize("detail", ["", "&detail=full"])
def test_every_media_type_has_the_same_figures(client: Client, detail: str) -> None:
    """The three media types have the same figures, with details and without."""
    by_country = client.get(f"{PATH}{detail}").json()
    lines = [
        {"country": country, "date": date, **day} for country, days in by_country.items() for date, day in days.items()
    ]
    ndjson = client.get(f"{PATH}{detail}", headers={"Accept": "application/x-ndjson"})
    assert ndjson.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in ndjson.text.splitlines()] == lines
    table = client.get(f"{PATH}{detail}", headers={"Accept": "text/csv"}).text
    assert list(csv.DictReader(io.StringIO(table))) == [
        {name: cell_of(value) for name, value in line.items()} for line in lines
    ]


@pytest.mark.parametrize("detail", ["", "&detail=full"])
def test_parquet_has_the_same_rows_as_ndjson(client: Client, detail: str) -> None:
    """Typed, with its own compression: a coding is not added."""
    lines = client.get(f"{PATH}{detail}", headers={"Accept": "application/x-ndjson"}).text.splitlines()
    response = client.get(f"{PATH}{detail}", headers={"Accept": PARQUET, "Accept-Encoding": "zstd"})
    assert response.headers["content-type"] == PARQUET
    assert "content-encoding" not in response.headers
    table = pq.read_table(io.BytesIO(response.content))
    assert [json.loads(msgspec.json.encode(row)) for row in table.to_pylist()] == [json.loads(line) for line in lines]
    assert [str(table.schema.field(name).type) for name in ("country", "date", "bus_count", "exist_accident")] == [
        "string",
        "date32[day]",
        "int64",
        "bool",
    ]


def test_parquet_without_data_has_its_columns(client: Client) -> None:
    """A range without data is a file without rows."""
    response = client.get("/country-stats?from=2023-05-01&to=2023-05-01", headers={"Accept": PARQUET})
    table = pq.read_table(io.BytesIO(response.content))
    assert (len(table), table.column_names[:3]) == (0, ["country", "date", "bus_count"])


@pytest.mark.parametrize("begin", "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
def test_csv_escapes_names_that_begin_like_formulas(world: World, client: Client, begin: str) -> None:
    """In CSV a name that begins like a formula is escaped; other special characters are quoted and kept."""
    name = f'{begin}HYPERLINK("http://x","a, b")\nc'
    world.fold_in(msgspec.structs.replace(stats("armenia"), country_name=name))
    response = client.get(f"{PATH}&detail=full&country=armenia", headers={"Accept": "text/csv"})
    (day, _) = csv.DictReader(io.StringIO(response.text, newline=""))
    assert day["country_name"] == f"'{name}"
    assert client.get(f"{PATH}&detail=full").json()["armenia"]["2024-05-01"]["country_name"] == name


def test_csv_escapes_slugs_that_begin_like_formulas(world: World, client: Client) -> None:
    """A slug that begins like a formula is escaped, and a negative number is not."""
    world.fold_in(stats("-92d62e6d", delay_total_ms=-9_000))
    response = client.get(f"{PATH}&country=-92d62e6d", headers={"Accept": "text/csv"})
    assert "\r\n'-92d62e6d,2024-05-01,8,40,false,-1.125\r\n" in response.text


def cell_of(value: object) -> str:
    """Return what a table has for a value."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def test_csv_without_data_has_its_header(client: Client) -> None:
    """A table without data still has its header."""
    response = client.get("/country-stats?from=2023-05-01&to=2023-05-01", headers={"Accept": "text/csv"})
    assert response.text.splitlines() == ["country,date,bus_count,passenger_count,exist_accident,average_delay_s"]


def test_unacceptable_media_type_is_406(client: Client) -> None:
    """A client that accepts none of the media types gets 406, with a problem that lists them."""
    response = client.get(PATH, headers={"Accept": "text/html"})
    assert (response.status_code, response.headers["content-type"]) == (406, "application/problem+json")
    assert "application/x-ndjson" in response.json()["detail"]


def test_compressed_response_equals_the_plain_one(client: Client) -> None:
    """Zstd and gzip responses hold the bytes of the plain response."""
    plain = client.get(PATH, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    with client.stream("GET", PATH, headers={"Accept-Encoding": "zstd"}) as response:
        assert response.headers["content-encoding"] == "zstd"
        assert zstd.decompress(b"".join(response.iter_raw())) == plain.content
    with client.stream("GET", PATH, headers={"Accept-Encoding": "gzip"}) as response:
        assert response.headers["content-encoding"] == "gzip"
        assert gzip.decompress(b"".join(response.iter_raw())) == plain.content


@pytest.mark.parametrize(
    ("form", "coding"),
    [
        *itertools.product(("application/json", "application/x-ndjson", "text/csv"), ("identity", "gzip", "zstd")),
        (PARQUET, "identity"),
    ],
)
def test_streamed_response_equals_the_buffered_one(form: str, coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long response is streamed, with the same bytes and ETag as a buffered one."""
    world = World()
    days = [dt.date(2024, 1, 1) + dt.timedelta(days=place) for place in range(60)]
    for country in ("armenia", "belgium", "chile"):
        for day in days:
            world.fold_in(stats(country, day, trips=day.day))
    path = f"/country-stats?from={days[0]}&to={days[-1]}&detail=full"
    headers = {"Accept": form, "Accept-Encoding": coding}
    monkeypatch.setattr(compression, "PART_BYTES_MIN", 10_000)
    with world.client() as client:
        plain = client.get(path, headers={**headers, "Accept-Encoding": "identity"}).content
        whole = client.get(path, headers=headers)
        monkeypatch.setattr(statistics, "BUFFERED_COUNTRY_DAYS_MAX", 10)
        with client.stream("GET", path, headers=headers) as response:
            body = b"".join(response.iter_raw())
    assert "content-length" not in response.headers
    assert response.headers["etag"] == whole.headers["etag"]
    assert response.headers.get("content-encoding", "identity") == coding
    decompress: dict[str, Callable[[bytes], Any]] = {"gzip": gzip.decompress, "zstd": zstd.decompress}
    assert bytes(decompress.get(coding, bytes)(body)) == plain
    assert len(body) < len(plain) / 4 or coding == "identity"


def test_every_large_response_is_compressed(world: World, client: Client) -> None:
    """Lists, ledgers, documents and pages are compressed for a client that accepts it, and the headers say so."""
    for place in range(10):
        write(world, record_of(NOW + dt.timedelta(milliseconds=place)))
    world.fold_in(*(stats("armenia", city_id=str(number)) for number in range(100)))
    paths = ["/process-requests", "/country-stats/armenia/2024-05-01", "/schema/openapi.json", "/metrics", "/"]
    for path in (*paths, "/page/api.js", "/page/style.css", "/docs/swagger-ui-bundle.js"):
        plain = client.get(path, headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.headers["vary"] == "Accept-Encoding"
        for coding, decompress in (("gzip", gzip.decompress), ("zstd", zstd.decompress)):
            with client.stream("GET", path, headers={"Accept-Encoding": coding}) as response:
                body = b"".join(response.iter_raw())
            assert (response.headers["content-encoding"], response.headers["vary"]) == (coding, "Accept-Encoding"), path
            assert int(response.headers["content-length"]) == len(body) < len(plain.content)
            if path != "/metrics":
                assert bytes(decompress(body)) == plain.content
            if "etag" in plain.headers:
                known = {"Accept-Encoding": coding, "If-None-Match": response.headers["etag"]}
                assert response.headers["etag"] != plain.headers["etag"]
                assert client.get(path, headers=known).status_code == 304


def test_small_responses_stay_plain(client: Client) -> None:
    """Small responses are sent without compression."""
    response = client.get("/health/live", headers={"Accept-Encoding": "gzip, zstd"})
    assert response.json() == {"live": True}
    assert "content-encoding" not in response.headers


def test_unchanged_response_is_304(world: World, client: Client) -> None:
    """A response is 304 until one of its numbers changes; then it has another ETag."""
    first = client.get(PATH)
    assert first.headers["vary"] == "Accept, Accept-Encoding"
    known = {"If-None-Match": first.headers["etag"]}
    again = client.get(PATH, headers=known)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert again.headers["vary"] == first.headers["vary"]
    world.fold_in(stats("belgium", trips=3, revision=6))
    changed = client.get(PATH, headers=known)
    assert changed.status_code == 200
    assert changed.headers["etag"] != first.headers["etag"]


def test_changes_of_other_days_and_countries_keep_the_etag(world: World, client: Client) -> None:
    """Changes of other days or other countries keep the ETag."""
    path = f"{PATH}&country=armenia"
    etag = client.get(path).headers["etag"]
    world.fold_in(stats("belgium", trips=3, revision=6))
    world.fold_in(stats("armenia", world.clock().date(), trips=3))
    assert client.get(path, headers={"If-None-Match": etag}).status_code == 304


def test_every_representation_has_its_own_etag(client: Client) -> None:
    """Another query, media type or coding has another ETag."""
    variants = [
        (path, {"Accept": accept, "Accept-Encoding": coding})
        for path in (PATH, f"{PATH}&detail=full", f"{PATH}&country=armenia", PATH.replace("05-02", "05-03"))
        for accept in ("application/json", "application/x-ndjson", "text/csv")
        for coding in ("identity", "gzip", "zstd")
    ]
    variants.append((PATH, {"Accept": PARQUET}))
    etags = []
    for path, headers in variants:
        with client.stream("GET", path, headers=headers) as response:
            etags.append(response.headers["etag"])
    assert len(set(etags)) == len(variants)
    assert all(etag.startswith('"') for etag in etags)


def test_the_first_version_has_the_same_etag(client: Client) -> None:
    """A query of the first version has the ETag of the same complete query."""
    assert client.get(PATH.replace("to=", "to")).headers["etag"] == client.get(PATH).headers["etag"]

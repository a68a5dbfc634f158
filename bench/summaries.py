"""An S3 server of generated summaries: it stores no object, and makes each on request.

Ten years of two hundred countries are 730,000 objects, too many to write for a benchmark. A key is
`summaries/generation=1/date=D/country=cNNN.json`. `POST /?change=YYYY-MM-DD` changes all summaries of a day and counts
them in the change index, as an aggregate does. `POST /?tables=N` builds the Parquet tables of the first N days, and
`GET /?count` returns the number of requests served. It serves listings, objects and ranges; it checks no signature.
"""

from __future__ import annotations

import argparse
import bisect
import datetime as dt
import hashlib
import itertools
import random
from collections import Counter
from typing import Any
from urllib.parse import parse_qs, unquote

import msgspec
import uvicorn

from shared.domain import keys, objects
from shared.domain.contribution import Contribution
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import ChangeCounters, GenerationPointer, LedgerEntry, PlanChunks, Summary
from shared.domain.tables import COUNTRY_DAYS, country_row
from shared.runtime.parquet import TableWriter

CITIES = 5
PAGE = 1_000
FOLDER = "summaries/generation=1/date="
POINTER = GenerationPointer(changes_counted_since=dt.datetime(2024, 5, 2, tzinfo=dt.UTC))
COUNTERS = keys.changes(1, "bench")


class Summaries:
    """The objects of a bucket, each by its key."""

    def __init__(self, first: dt.date, days: int, countries: int) -> None:
        self.dates = [str(first + dt.timedelta(days=place)) for place in range(days)]
        self.countries = [f"c{number:03d}" for number in range(countries)]
        self.changes: Counter[str] = Counter()

    def counters(self) -> bytes:
        """Return the object of the one writer in the change index."""
        months = Counter[str]()
        for date, times in self.changes.items():
            months[date[:7]] += times
        return objects.encode(ChangeCounters(months=dict(sorted(months.items()))))

    def body(self, date: str, country: str) -> bytes:
        """Return the summary of a country-day: the same bytes each time, until its day is changed."""
        dice = random.Random(f"{date} {country} {self.changes[date]}")
        revision = 152_703_181 + self.changes[date]
        ledger = {}
        for city in range(CITIES):
            contribution = Contribution(
                trips=dice.randrange(10_000),
                passengers=dice.randrange(1_000_000),
                accidents=dice.randrange(3),
                delay_total_ms=dice.randrange(100_000_000),
            )
            ledger[CityId(str(city))] = LedgerEntry(
                revision=revision,
                city_name=f"City {city}",
                contribution=contribution,
                sha256=hashlib.sha256(f"{date}{country}{city}".encode()).hexdigest(),
                ingested_at=dt.datetime(2024, 5, 2, 1, tzinfo=dt.UTC),
            )
        figures = [entry.contribution for entry in ledger.values() if entry.contribution]
        return objects.encode(
            Summary(
                date=dt.date.fromisoformat(date),
                country=CountrySlug(country),
                country_name=country.upper(),
                version=revision * CITIES,
                totals=Contribution(
                    trips=sum(one.trips for one in figures),
                    passengers=sum(one.passengers for one in figures),
                    accidents=sum(one.accidents for one in figures),
                    delay_total_ms=sum(one.delay_total_ms for one in figures),
                ),
                has_data=True,
                cities_reported=CITIES,
                cities_expected=CITIES,
                complete=True,
                last_ingested_at=dt.datetime(2024, 5, 2, 1, tzinfo=dt.UTC),
                plan_revision=revision,
                plans=(PlanChunks(revision=revision, chunks=1, cities={0: tuple(ledger)}),),
                ledger=ledger,
            )
        )

    def etag(self, date: str, country: str) -> str:
        """Return an ETag that changes with the object."""
        return f'"{hashlib.md5(f"{date} {country} {self.changes[date]}".encode()).hexdigest()}"'

    def listing(self, prefix: str, after: str) -> bytes:
        """Return a page of a listing as XML."""
        if prefix.startswith(keys.CHANGES):
            found = [(COUNTERS, etag_of(self.counters()))] if after < COUNTERS else []
            return page_of(found, more=False)
        first = max(prefix, after)
        dates = (
            self.dates[bisect.bisect_left(self.dates, first[len(FOLDER) :][:10]) :] if first >= FOLDER else self.dates
        )
        names = (
            (key, date, country)
            for date in dates
            for country in self.countries
            if (key := f"{FOLDER}{date}/country={country}.json").startswith(prefix) and key > after
        )
        listed = [(key, self.etag(date, country)) for key, date, country in itertools.islice(names, PAGE + 1)]
        return page_of(listed[:PAGE], more=len(listed) > PAGE)


def etag_of(body: bytes) -> str:
    """Return the ETag of an object."""
    return f'"{hashlib.md5(body).hexdigest()}"'


def page_of(listed: list[tuple[str, str]], *, more: bool) -> bytes:
    """Return a page of a listing as XML, from keys and their ETags."""
    entries = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2024-05-02T01:00:00.000Z</LastModified>"
        f"<ETag>{etag.replace(chr(34), '&quot;')}</ETag><Size>1500</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
        for key, etag in listed
    )
    token = f"<NextContinuationToken>{listed[-1][0]}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}<KeyCount>{len(listed)}</KeyCount>{entries}"
        "</ListBucketResult>"
    ).encode()


def tables_of(summaries: Summaries, days: int) -> dict[str, bytes]:
    """Return the files of the table of country-days for the first days, by key."""
    tables = {}
    for month, dates in itertools.groupby(summaries.dates[:days], key=lambda date: date[:7]):
        writer = TableWriter(COUNTRY_DAYS)
        for date in dates:
            rows = []
            for country in summaries.countries:
                key = f"{FOLDER}{date}/country={country}.json"
                summary = objects.decode(Summary, summaries.body(date, country), key)
                rows.append(country_row(summary, (1, summaries.etag(date, country)), key))
            writer.add(rows)
        tables[COUNTRY_DAYS.key(month)] = writer.close({})
    return tables


def app_of(summaries: Summaries) -> Any:
    """Return the server as an ASGI app."""
    counts: Counter[str] = Counter()
    stored = {keys.CURRENT: objects.encode(POINTER), COUNTERS: summaries.counters()}

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        path = unquote(scope["raw_path"].decode())
        query = parse_qs(scope["query_string"].decode(), keep_blank_values=True)
        headers = {}
        status, body = 200, b""
        if "count" in query:
            body = msgspec.json.encode(counts)
        elif "change" in query:
            summaries.changes[query["change"][0]] += 1
            stored[COUNTERS] = summaries.counters()
        elif "tables" in query:
            stored.update(tables_of(summaries, int(query["tables"][0])))
        elif "list-type" in query:
            counts["list"] += 1
            after = query.get("continuation-token", query.get("start-after", [""]))[0]
            body = summaries.listing(query["prefix"][0], after)
        else:
            counts["get"] += 1
            parts = path.split("/")
            if (found := stored.get(path.partition("/bench/")[2])) is not None:
                body = found
                headers[b"etag"] = etag_of(body).encode()
            elif "/summaries/" not in path:
                status, body = 404, b"<Error><Code>NoSuchKey</Code></Error>"
            else:
                date, country = parts[-2].removeprefix("date="), parts[-1].removeprefix("country=")[:-5]
                body = summaries.body(date, country)
                headers[b"etag"] = summaries.etag(date, country).encode()
                wanted = dict(scope["headers"]).get(b"range")
                if wanted:
                    status, total = 206, len(body)
                    body = body[: int(wanted.partition(b"-")[2]) + 1]
                    headers[b"content-range"] = b"bytes 0-%d/%d" % (len(body) - 1, total)
        headers[b"content-length"] = b"%d" % len(body)
        await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
        await send({"type": "http.response.body", "body": body})

    return app


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--first", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--days", type=int, required=True)
    parser.add_argument("--countries", type=int, required=True)
    options = parser.parse_args()
    app = app_of(Summaries(options.first, options.days, options.countries))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="error", lifespan="off", loop="uvloop")


if __name__ == "__main__":
    main()

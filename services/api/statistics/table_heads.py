"""Heads of many summaries at once, from the Parquet tables: so a cold cache needs one object for a month.

A row counts only under the generation and the ETag that the listing of the summaries has. So it is as fresh as the
summary itself, however old the table is. The caller reads the summaries that a table lacks, or has under another ETag;
all of them if the table cannot be read.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import structlog

from shared.domain import keys
from shared.domain.contribution import Contribution
from shared.domain.objects import SummaryHead
from shared.domain.tables import COUNTRY_DAYS, optional_figure
from shared.runtime.concurrency import SingleFlight, bounded_map
from shared.runtime.parquet import TableReader, UnreadableTable
from shared.storage.object_store import ObjectStore, StoreUnavailable

HEADS_MIN = 50
"""Of fewer heads in a month, each is read by itself. A table also has those that nobody asked for."""
CONCURRENT_TABLES_MAX = 4

_log = structlog.get_logger()

_Rows = Mapping[str, tuple[str, SummaryHead]]
"""The ETag and the head of each summary, by its key."""


class TableHeads:
    """Reads heads from the tables. Concurrent queries of a month share its table."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._tables = SingleFlight[_Rows]()

    async def heads(self, generation: int, wanted: Mapping[str, str]) -> dict[str, SummaryHead]:
        """Return the heads of ``wanted`` summaries, their ETags by key, that a table has under the same ETag."""
        by_month: defaultdict[str, list[str]] = defaultdict(list)
        for key in wanted:
            date = keys.parse_date(key)
            if date is not None:
                by_month[keys.month_of(date)].append(key)
        months = [month for month, of_month in by_month.items() if len(of_month) >= HEADS_MIN]
        tables = await bounded_map(partial(self._table, generation), months, limit=CONCURRENT_TABLES_MAX)
        found: dict[str, SummaryHead] = {}
        for month, table in zip(months, tables, strict=True):
            for key in by_month[month]:
                etag, head = table.get(key, ("", None))
                if head is not None and etag == wanted[key]:
                    found[key] = head
        return found

    async def _table(self, generation: int, month: str) -> _Rows:
        return await self._tables.run(f"{generation} {month}", partial(self._read, generation, month))

    async def _read(self, generation: int, month: str) -> _Rows:
        key = COUNTRY_DAYS.key(month)
        try:
            found = await self._store.get(key)
            return {} if found is None else await asyncio.to_thread(rows_of, found.body, generation)
        except (StoreUnavailable, UnreadableTable) as error:
            # The API may lack the right to read the table. If S3 is unavailable, reading the summaries fails too.
            _log.warning("table_not_read", key=key, error=str(error))
            return {}


def rows_of(body: bytes, generation: int) -> _Rows:
    """Return the rows of a generation in a file of the table of country-days. Raises UnreadableTable."""
    rows: dict[str, tuple[str, SummaryHead]] = {}
    for (
        date, country, country_name, trips, passengers, accidents, delay_total_ms, has_data, complete, reported,
        expected, suspicious, last_ingested_at, version, plan_revision, schema_version, of_generation, etag,
    ) in zip(*TableReader(COUNTRY_DAYS, body).columns(*_COLUMNS), strict=True):  # fmt: skip
        if of_generation == generation:
            rows[keys.summary(generation, date, country)] = (
                etag,
                SummaryHead(
                    schema_version=schema_version,
                    date=date,
                    country=country,
                    country_name=country_name,
                    version=version,
                    totals=Contribution(
                        trips=trips, passengers=passengers, accidents=accidents, delay_total_ms=delay_total_ms
                    ),
                    has_data=has_data,
                    cities_reported=reported,
                    cities_expected=expected,
                    complete=complete,
                    last_ingested_at=last_ingested_at,
                    plan_revision=plan_revision,
                    cities_suspicious=optional_figure(suspicious),
                ),
            )
    return rows


_COLUMNS = tuple(name for name in COUNTRY_DAYS.names if name != "average_delay_s")

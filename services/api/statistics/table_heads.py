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
from shared.domain.contribution import Totals
from shared.domain.objects import SummaryHead
from shared.domain.tables import COUNTRY_DAYS, optional_figure
from shared.runtime.concurrency import SingleFlight, bounded_map
from shared.runtime.parquet import TableReader, UnreadableTable
from shared.storage.object_store import ObjectStore, StoreUnavailable

HEADS_MIN = 50
"""Of fewer heads in a month, each is read by itself. A table also has those that nobody asked for."""
CONCURRENT_TABLES_MAX = 4

_log = structlog.get_logger()


class TableHeads:
    """Reads heads from the tables. Concurrent queries of the same heads of a month share its table."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._tables = SingleFlight[dict[str, SummaryHead]]()

    async def heads(self, generation: int, wanted: Mapping[str, str]) -> dict[str, SummaryHead]:
        """Return the heads of ``wanted`` summaries, their ETags by key, that a table has under the same ETag."""
        by_month: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for key, etag in wanted.items():
            date = keys.parse_date(key)
            if date is not None:
                by_month[keys.month_of(date)][key] = etag
        months = [(month, of_month) for month, of_month in by_month.items() if len(of_month) >= HEADS_MIN]
        tables = await bounded_map(partial(self._table, generation), months, limit=CONCURRENT_TABLES_MAX)
        return {key: head for table in tables for key, head in table.items()}

    async def _table(self, generation: int, of_month: tuple[str, Mapping[str, str]]) -> dict[str, SummaryHead]:
        month, wanted = of_month
        name = (month, frozenset(wanted.items()))
        return await self._tables.run(name, partial(self._read, generation, month, wanted))

    async def _read(self, generation: int, month: str, wanted: Mapping[str, str]) -> dict[str, SummaryHead]:
        key = COUNTRY_DAYS.key(month)
        try:
            found = await self._store.get(key)
            return {} if found is None else await asyncio.to_thread(heads_of, found.body, generation, wanted)
        except (StoreUnavailable, UnreadableTable) as error:
            # The API may lack the right to read the table. If S3 is unavailable, reading the summaries fails too.
            _log.warning("table_not_read", key=key, error=str(error))
            return {}


def heads_of(body: bytes, generation: int, wanted: Mapping[str, str]) -> dict[str, SummaryHead]:
    """Return the heads of ``wanted`` summaries that a file of the table of country-days has. Raises UnreadableTable."""
    table = TableReader(COUNTRY_DAYS, body)
    if set(wanted.values()).isdisjoint(*table.columns("summary_etag")):
        return {}  # as after a change of a whole day, which the next table will have
    heads: dict[str, SummaryHead] = {}
    for (
        date, country, country_name, trips, passengers, accidents, delay_total_ms, has_data, complete, reported,
        expected, suspicious, last_ingested_at, version, plan_revision, schema_version, of_generation, etag,
    ) in zip(*table.columns(*_COLUMNS), strict=True):  # fmt: skip  # a name for each column, not a line
        key = keys.summary(generation, date, country)
        if of_generation == generation and wanted.get(key) == etag:
            heads[key] = SummaryHead(
                schema_version=schema_version,
                date=date,
                country=country,
                country_name=country_name,
                version=version,
                totals=Totals(trips=trips, passengers=passengers, accidents=accidents, delay_total_ms=delay_total_ms),
                has_data=has_data,
                cities_reported=reported,
                cities_expected=expected,
                complete=complete,
                last_ingested_at=last_ingested_at,
                plan_revision=plan_revision,
                cities_suspicious=optional_figure(suspicious),
            )
    return heads


_COLUMNS = tuple(name for name in COUNTRY_DAYS.names if name != "average_delay_s")

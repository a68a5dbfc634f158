"""Query the summaries on S3 with DuckDB, by the columns that their keys hold (Hive style).

    python examples/summaries_duckdb.py --from 2024-05-01 --to 2024-05-31

prints a line of JSON for each country-day. Summaries lie under ``summaries/generation=N/date=D/country=C.json``.
``state/current.json`` names the live generation N: a rebuild makes another one and moves that pointer. So the example
reads N each time, and again at the end, in case the generation was dropped during the query.

DuckDB reads the objects through s3fs. It can also use its own extension ``httpfs``, which ``INSTALL httpfs`` downloads.
Then leave out ``register_filesystem``, and make a secret in its place::

    CREATE SECRET (TYPE s3, PROVIDER credential_chain, ENDPOINT '127.0.0.1:8333', URL_STYLE 'path', USE_SSL false)
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
from typing import Any

import duckdb
import s3fs

TRIES_MAX = 5

# The body has a date too; the key's serves to leave out other dates' objects unread.
SUMMARIES = """
    select country, date, country_name, version, complete, cities_reported, cities_expected,
           totals.trips, totals.passengers, totals.accidents, totals.delay_total_ms
    from read_json(?, hive_partitioning = true, hive_types = {'generation': BIGINT, 'date': DATE},
        columns = {
            'country': 'VARCHAR', 'country_name': 'VARCHAR', 'version': 'BIGINT', 'complete': 'BOOLEAN',
            'has_data': 'BOOLEAN', 'cities_reported': 'BIGINT', 'cities_expected': 'BIGINT',
            'totals': 'STRUCT(trips BIGINT, passengers BIGINT, accidents BIGINT, delay_total_ms BIGINT)'})
    where has_data and date between ? and ?
    order by country, date
"""


def read_summaries(files: s3fs.S3FileSystem, bucket: str, first: dt.date, last: dt.date) -> list[dict[str, Any]]:
    """Return the summaries of a range of dates, all of one generation."""
    for _ in range(TRIES_MAX):
        generation = live_generation(files, bucket)
        try:
            summaries = query(files, f"s3://{bucket}/summaries/generation={generation}/*/*.json", first, last)
        except (duckdb.IOException, FileNotFoundError):
            if live_generation(files, bucket) == generation:
                raise
        else:
            if live_generation(files, bucket) == generation:
                return summaries
    raise SystemExit(f"the live generation changed {TRIES_MAX} times: try again")


def live_generation(files: s3fs.S3FileSystem, bucket: str) -> int:
    """Return the number of the generation that is live: 1 until the first rebuild."""
    files.invalidate_cache()
    try:
        current = json.loads(files.cat_file(f"{bucket}/state/current.json"))
    except FileNotFoundError:
        return 1
    return int(current["live"])


def query(files: s3fs.S3FileSystem, pattern: str, first: dt.date, last: dt.date) -> list[dict[str, Any]]:
    """Run the query, and return its rows by column name."""
    with duckdb.connect() as database:
        database.register_filesystem(files)
        found = database.execute(SUMMARIES, [pattern, first, last])
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def main() -> None:
    """Read the settings, query, print the rows. S3's keys are the usual AWS variables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--to", dest="last", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--endpoint-url", default=os.environ.get("TRIPFOLD_S3_ENDPOINT_URL"), help="unset: AWS")
    parser.add_argument("--bucket", default=os.environ.get("TRIPFOLD_S3_BUCKET", "tripfold"))
    options = parser.parse_args()
    files = s3fs.S3FileSystem(endpoint_url=options.endpoint_url, use_listings_cache=False)
    for summary in read_summaries(files, options.bucket, options.first, options.last):
        print(json.dumps(summary, default=str))


if __name__ == "__main__":
    main()

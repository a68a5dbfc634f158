"""Query the raw trips of a date with DuckDB, joined through the manifests.

    python examples/raw_trips_duckdb.py --date 2024-05-01

prints a line of JSON for each country. ``raw/date=D/city=C/`` holds every attempt at a city's file that was ever
stored: corrected files beside the wrong ones, refused files, and what crashed workers left. Only the object that the
city's manifest names counts, so the manifests are read first, and no others. Standard error says how many objects a
bare ``raw/date=D/*/*.json`` would have read. The manifest also says which country a city belongs to.

The query reads files as Tripfold does: a byte order mark is skipped, and of a repeated field the last value counts.
For files of lines (``TRIPFOLD_INGEST_RECORDS=lines``) write ``format = 'newline_delimited'``.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
from typing import Any

import duckdb
import s3fs

MANIFESTS = """
    create table manifests as
    select city_id, country, 's3://' || ? || '/' || raw_key as raw_url
    from read_json(?, columns = {'city_id': 'VARCHAR', 'country': 'VARCHAR', 'raw_key': 'VARCHAR'})
"""
# read_json refuses a record that repeats a field, and the -> operator takes the first value.
LAST_VALUE = """
    create macro last_value(record, field) as (record->>'$.*')[-list_position(list_reverse(json_keys(record)), field)]
"""
TRIPS = """
    select country, count(*) as trips, sum(last_value(json, 'passengers')::BIGINT) as passengers,
           count_if(last_value(json, 'accident')::BOOLEAN) as accidents,
           count(distinct last_value(json, 'bus-type')) as bus_types, count(distinct city_id) as cities
    from read_json_objects(?, format = 'array', filename = true) as raw
    join manifests on manifests.raw_url = raw.filename
    where json_type(json) = 'OBJECT'
    group by country
    order by country
"""


def read_trips(files: s3fs.S3FileSystem, bucket: str, date: dt.date) -> tuple[list[dict[str, Any]], int]:
    """Return the figures of each country, and how many files the manifests name."""
    with duckdb.connect() as database:
        database.register_filesystem(files)
        database.execute(MANIFESTS, [bucket, f"s3://{bucket}/manifests/date={date}/*.json"])
        database.execute(LAST_VALUE)
        stored = {f"s3://{key}" for key in files.glob(f"{bucket}/raw/date={date}/*/*.json")}
        named = [url for (url,) in database.execute("select raw_url from manifests").fetchall()]
        current = [url for url in named if url in stored]  # the others have expired
        if not current:
            return [], 0
        found = database.execute(TRIPS, [current])
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()], len(current)


def main() -> None:
    """Read the settings, query, print the figures. S3's keys are the usual AWS variables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--endpoint-url", default=os.environ.get("TRIPFOLD_S3_ENDPOINT_URL"), help="unset: AWS")
    parser.add_argument("--bucket", default=os.environ.get("TRIPFOLD_S3_BUCKET", "tripfold"))
    options = parser.parse_args()
    files = s3fs.S3FileSystem(endpoint_url=options.endpoint_url, use_listings_cache=False)
    figures, current = read_trips(files, options.bucket, options.date)
    for of_country in figures:
        print(json.dumps(of_country))
    attempts = len(files.glob(f"{options.bucket}/raw/date={options.date}/*/*.json"))
    print(f"{current} files by the manifests; a bare glob over raw/ would have read {attempts}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Query the raw trips of a date with DuckDB, joined through the manifests.

    python examples/raw_trips_duckdb.py --date 2024-05-01

prints a line of JSON for each country. ``raw/date=D/city=C/`` holds every attempt at a city's file that was ever
stored: corrected files beside the wrong ones, and what crashed workers left. Only the object that the city's manifest
names counts, so the manifests are read first, and no others. How many trips a bare ``raw/date=D/*/*.json`` would have
counted is told on standard error. The manifest also says which country a city belongs to.
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
TRIPS = """
    select country, count(*) as trips, sum(passengers) as passengers, count_if(accident) as accidents,
           count(distinct "bus-type") as bus_types, count(distinct city_id) as cities
    from read_json(?, filename = true, columns = {
        'departure-time': 'TIMESTAMP', 'bus-type': 'VARCHAR', 'passengers': 'BIGINT', 'delay': 'VARCHAR',
        'accident': 'BOOLEAN'}) as raw
    join manifests on manifests.raw_url = raw.filename
    group by country
    order by country
"""


def read_trips(files: s3fs.S3FileSystem, bucket: str, date: dt.date) -> tuple[list[dict[str, Any]], int]:
    """Return the figures of each country, and how many trips all attempts of the date hold together."""
    with duckdb.connect() as database:
        database.register_filesystem(files)
        database.execute(MANIFESTS, [bucket, f"s3://{bucket}/manifests/date={date}/*.json"])
        current = [url for (url,) in database.execute("select raw_url from manifests").fetchall()]
        found = database.execute(TRIPS, [current])
        names = [column[0] for column in found.description or ()]
        figures = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        everything = f"s3://{bucket}/raw/date={date}/*/*.json"
        [[attempts]] = database.execute(
            "select count(*) from read_json(?, columns = {accident: 'BOOLEAN'})", [everything]
        ).fetchall()
        return figures, int(attempts)


def main() -> None:
    """Read the settings, query, print the figures. S3's keys are the usual AWS variables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--endpoint-url", default=os.environ.get("TRIPFOLD_S3_ENDPOINT_URL"), help="unset: AWS")
    parser.add_argument("--bucket", default=os.environ.get("TRIPFOLD_S3_BUCKET", "tripfold"))
    options = parser.parse_args()
    files = s3fs.S3FileSystem(endpoint_url=options.endpoint_url, use_listings_cache=False)
    figures, attempts = read_trips(files, options.bucket, options.date)
    for of_country in figures:
        print(json.dumps(of_country))
    trips = sum(of_country["trips"] for of_country in figures)
    print(f"{trips} trips by the manifests; a bare glob over raw/ would have counted {attempts}", file=sys.stderr)


if __name__ == "__main__":
    main()

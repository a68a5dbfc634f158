"""Query the Parquet tables on S3 with SQL, by DuckDB.

    python examples/tables_duckdb.py "select country, sum(trips) from country_days group by country"

prints a line of JSON for each row. The tables are ``country_days`` and ``city_days``. Each month is one file,
``lake/{table}/month=YYYY-MM/{table}.parquet``; DuckDB reads only the columns and months that the query needs.

DuckDB reads the files through s3fs. It can also use its own extension ``httpfs``, which ``INSTALL httpfs`` downloads.
Then leave out ``register_filesystem``, and make a secret in its place::

    CREATE SECRET (TYPE s3, PROVIDER credential_chain, ENDPOINT '127.0.0.1:8333', URL_STYLE 'path', USE_SSL false)
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import duckdb
import s3fs

TABLES = ("country_days", "city_days")
TOTALS = """
    select country, date, trips, passengers, accidents, average_delay_s, complete
    from country_days
    where has_data
    order by country, date
"""


def query(files: s3fs.S3FileSystem, bucket: str, sql: str) -> list[dict[str, Any]]:
    """Run a query over the tables, and return its rows by column name."""
    with duckdb.connect() as database:
        database.register_filesystem(files)
        for table in TABLES:
            pattern = f"s3://{bucket}/lake/{table}/*/{table}.parquet"
            database.execute(f"create view {table} as from read_parquet('{pattern}', hive_partitioning = true)")
        found = database.execute(sql)
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def main() -> None:
    """Read the settings, query, print the rows. S3's keys are the usual AWS variables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sql", nargs="?", default=TOTALS, help="default: the totals of every country-day")
    parser.add_argument("--endpoint-url", default=os.environ.get("TRIPFOLD_S3_ENDPOINT_URL"), help="unset: AWS")
    parser.add_argument("--bucket", default=os.environ.get("TRIPFOLD_S3_BUCKET", "tripfold"))
    options = parser.parse_args()
    files = s3fs.S3FileSystem(endpoint_url=options.endpoint_url, use_listings_cache=False)
    for row in query(files, options.bucket, options.sql):
        print(json.dumps(row, default=str))


if __name__ == "__main__":
    main()

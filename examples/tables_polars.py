"""Read the Parquet tables on S3 with Polars, lazily: it fetches only the columns and months that the query needs.

    python examples/tables_polars.py --from 2024-05-01 --to 2024-05-31

prints a line of JSON for each city and day: its trips, its passengers, and the SHA-256 of the file that was counted.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os

import polars as pl


def city_days(bucket: str, endpoint_url: str | None, first: dt.date, last: dt.date) -> pl.LazyFrame:
    """Return the city-days of a range of dates."""
    endpoint = {"aws_endpoint_url": endpoint_url, "aws_allow_http": "true"} if endpoint_url else {}
    month, date = pl.col("month"), pl.col("date")
    return pl.scan_parquet(
        f"s3://{bucket}/lake/city_days/*/city_days.parquet", hive_partitioning=True, storage_options=endpoint
    ).filter(month.is_between(pl.lit(f"{first:%Y-%m}"), pl.lit(f"{last:%Y-%m}")), date.is_between(first, last))


def main() -> None:
    """Read the settings, query, print the rows. S3's keys are the usual AWS variables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--to", dest="last", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--endpoint-url", default=os.environ.get("TRIPFOLD_S3_ENDPOINT_URL"), help="unset: AWS")
    parser.add_argument("--bucket", default=os.environ.get("TRIPFOLD_S3_BUCKET", "tripfold"))
    options = parser.parse_args()
    days = city_days(options.bucket, options.endpoint_url, options.first, options.last)
    wanted = days.select("country", "city_id", "date", "trips", "passengers", "sha256")
    print(wanted.collect().write_ndjson(), end="")


if __name__ == "__main__":
    main()

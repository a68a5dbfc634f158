"""Read the Parquet tables on S3 into a DataFrame of pandas.

    python examples/tables_pandas.py --from 2024-05-01 --to 2024-05-31

prints a line of JSON for each country: its trips, its passengers, and its average delay per trip.

An average of averages is wrong, because days have different numbers of trips. So the example adds up the exact sums,
and divides once.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os

import pandas as pd


def read_country_days(bucket: str, endpoint_url: str | None, first: dt.date, last: dt.date) -> pd.DataFrame:
    """Return the country-days of a range of dates. Only the files of its months are read."""
    months = [("month", ">=", f"{first:%Y-%m}"), ("month", "<=", f"{last:%Y-%m}")]
    return pd.read_parquet(
        f"s3://{bucket}/lake/country_days",
        filters=[*months, ("date", ">=", first), ("date", "<=", last), ("has_data", "==", True)],
        storage_options={"endpoint_url": endpoint_url, "use_listings_cache": False},
    )


def totals(days: pd.DataFrame) -> pd.DataFrame:
    """Return the sums of each country, and its average delay in seconds."""
    found = days.groupby("country", as_index=False)[["trips", "passengers", "delay_total_ms"]].sum()
    found["average_delay_s"] = (found.delay_total_ms / found.trips / 1000).where(found.trips > 0)
    return found


def main() -> None:
    """Read the settings, read the tables, print the totals. S3's keys are the usual AWS variables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--to", dest="last", type=dt.date.fromisoformat, required=True)
    parser.add_argument("--endpoint-url", default=os.environ.get("TRIPFOLD_S3_ENDPOINT_URL"), help="unset: AWS")
    parser.add_argument("--bucket", default=os.environ.get("TRIPFOLD_S3_BUCKET", "tripfold"))
    options = parser.parse_args()
    days = read_country_days(options.bucket, options.endpoint_url, options.first, options.last)
    print(totals(days).to_json(orient="records", lines=True), end="")


if __name__ == "__main__":
    main()

"""The fold of `bench.fold` by Quix Streams, in a process that has nothing of Tripfold in it: `python -m bench.quix`.

It reads the topic of `TRIPFOLD_TOPIC_PREFIX` from its beginning until it has seen so many events, and prints what it
measured as JSON.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import tempfile
import time
import uuid
from typing import Any, Final

import msgspec

from bench.context import peak_rss_bytes

Sums = tuple[int, int, int, int]
"""Trips, passengers, accidents, and the total of delays in ms."""

NOTHING: Final[Sums] = (0, 0, 0, 0)
FIGURES: Final = ("trips", "passengers", "accidents", "delay_total_ms")


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one contender: ``by_date`` is what it found for some dates, ``country_days`` how many in all."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    by_date: dict[dt.date, Sums]
    country_days: int | None = None


def main() -> None:
    """Fold, and print what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--changelog", action="store_true")
    options = parser.parse_args()
    print(msgspec.json.encode(fold_with_quix(options.events, changelog=options.changelog)).decode())


def fold_with_quix(events: int, *, changelog: bool) -> Measured:
    """Fold the topic into Quix's state store, and with ``changelog`` into a topic of its changes."""
    from quixstreams import Application  # noqa: PLC0415 - a peer that need not be there
    from quixstreams.models import Deserializer  # noqa: PLC0415 - as above

    by_date: dict[str, list[int]] = {}

    class CountryDay(Deserializer):
        def __call__(self, value: bytes, ctx: object) -> str:  # noqa: ARG002 - Quix names it
            return value.decode().rpartition("/")[0]

    class Json(Deserializer):
        def __call__(self, value: bytes, ctx: object) -> Any:  # noqa: ARG002 - as above
            return msgspec.json.decode(value)

    def fold(event: dict[str, Any], state: Any) -> None:
        city = event["city_id"]
        known = state.get(city)
        if known is not None and known["revision"] >= event["revision"]:
            return
        contribution = event["contribution"]
        totals = state.get("totals") or dict.fromkeys(FIGURES, 0)
        of_date = by_date.setdefault(event["date"], [0, 0, 0, 0])
        for place, name in enumerate(FIGURES):
            change = contribution[name] - (known["contribution"][name] if known else 0)
            totals[name] += change
            of_date[place] += change
        state.set(city, {"revision": event["revision"], "contribution": contribution})
        state.set("totals", totals)

    with tempfile.TemporaryDirectory() as folder:
        app = Application(
            broker_address=os.environ["TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS"],
            consumer_group=f"bench-{uuid.uuid4().hex}",
            auto_offset_reset="earliest",
            state_dir=folder,
            use_changelog_topics=changelog,
            loglevel="WARNING",
        )
        topic = app.topic(
            f"{os.environ['TRIPFOLD_TOPIC_PREFIX']}city-stats",
            key_deserializer=CountryDay(),
            value_deserializer=Json(),
        )
        app.dataframe(topic).update(fold, stateful=True)
        wall, cpu = time.perf_counter(), time.process_time()
        app.run(count=events, collect=False)
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return Measured(
        wall_s=wall_s,
        cpu_s=cpu_s,
        peak_rss_bytes=peak_rss_bytes(),
        by_date={
            dt.date.fromisoformat(date): (trips, passengers, accidents, delay_total_ms)
            for date, (trips, passengers, accidents, delay_total_ms) in by_date.items()
        },
    )


if __name__ == "__main__":
    main()

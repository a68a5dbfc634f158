"""Follow the totals of every country-day with FastStream.

    python examples/summaries_faststream.py

prints a line of JSON for each summary that is newer than the last one of its key, until Ctrl-C. Records come at least
once, and an older one can come after a newer one: the highest ``version`` of a key counts.

It reads the whole topic at each start, in no consumer group, since it keeps its state only in memory. A consumer that
keeps its state in a database commits its offsets there, as ``rebuild_table.py`` does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from typing import Any

from faststream import FastStream
from faststream.kafka import KafkaBroker


def make_app(options: argparse.Namespace) -> FastStream:
    """Return the application: one subscriber, and with ``--idle-s`` a watch that ends it."""
    broker = KafkaBroker(options.bootstrap_servers.split(","), logger=None)
    app = FastStream(broker, logger=None)
    newest: dict[tuple[str, str], int] = {}
    heard = asyncio.Event()

    @broker.subscriber(options.topic_prefix + "country-day-summaries", auto_offset_reset="earliest")
    async def print_newer(summary: Any) -> None:
        heard.set()
        if not isinstance(summary, dict) or summary.get("type") != "country-day-summary":
            return  # what is not JSON comes as bytes
        key = summary["date"], summary["country"]
        if summary["version"] > newest.get(key, 0):
            newest[key] = summary["version"]
            print(json.dumps(summary), flush=True)

    async def end_when_idle() -> None:
        await heard.wait()
        with contextlib.suppress(TimeoutError):
            while True:
                heard.clear()
                await asyncio.wait_for(heard.wait(), options.idle_s)
        app.exit()

    @app.after_startup
    async def watch() -> None:
        if options.idle_s is not None:
            app.context.set_global("watch", asyncio.create_task(end_when_idle()))

    return app


def main() -> None:
    """Read the settings and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bootstrap-servers", default=os.environ.get("TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9092")
    )
    parser.add_argument("--topic-prefix", default=os.environ.get("TRIPFOLD_TOPIC_PREFIX", ""))
    parser.add_argument("--idle-s", type=float, help="after the first record, end at so many seconds without one")
    asyncio.run(make_app(parser.parse_args()).run())


if __name__ == "__main__":
    main()

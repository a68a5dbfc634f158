"""The network faults of the tests in this folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import msgspec

from tests.network.toxiproxy import Toxic, Toxiproxy


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """A fault between Tripfold and ``proxy`` and its duration; without toxics the proxy is down."""

    name: str
    proxy: Literal["kafka", "s3"]
    toxics: tuple[Toxic, ...] = ()
    duration_s: float = 6.0

    @property
    def breaks(self) -> bool:
        """Whether the fault breaks connections; otherwise it only delays bytes."""
        return not any(toxic.type == "latency" for toxic in self.toxics)

    @property
    def can_select_again(self) -> bool:
        """Whether the toxics can select other connections during the fault, because no byte has been lost yet."""
        return any(toxic.toxicity < 1 and toxic.type in {"reset_peer", "limit_data"} for toxic in self.toxics)

    def inject(self, toxiproxy: Toxiproxy, proxy: str) -> AbstractContextManager[None]:
        """Inject the fault at a proxy during the block."""
        return toxiproxy.with_toxics(proxy, self.toxics) if self.toxics else toxiproxy.down(proxy)


FAULTS = (
    Fault(
        name="S3 resets connections",
        proxy="s3",
        toxics=(Toxic(type="reset_peer", toxicity=0.3, attributes={"timeout": 20}),),
    ),
    Fault(
        name="S3 responses break off",
        proxy="s3",
        toxics=(Toxic(type="limit_data", toxicity=0.3, attributes={"bytes": 700}),),
    ),
    Fault(
        name="requests to S3 break off",
        proxy="s3",
        toxics=(Toxic(type="limit_data", stream="upstream", toxicity=0.3, attributes={"bytes": 1_500}),),
    ),
    Fault(
        name="S3 applies requests and does not respond",
        proxy="s3",
        toxics=(Toxic(type="timeout", toxicity=0.3, attributes={"timeout": 1_000}),),
    ),
    Fault(
        name="S3 is slow and sends small pieces",
        proxy="s3",
        toxics=(
            Toxic(type="latency", attributes={"latency": 300, "jitter": 300}),
            Toxic(type="slicer", attributes={"average_size": 60, "size_variation": 30, "delay": 2_000}),
        ),
    ),
    Fault(name="S3 is down", proxy="s3", duration_s=12.0),
    Fault(
        name="Kafka resets connections",
        proxy="kafka",
        toxics=(Toxic(type="reset_peer", toxicity=0.5, attributes={"timeout": 300}),),
    ),
    Fault(
        name="Kafka accepts requests and does not respond",
        proxy="kafka",
        toxics=(Toxic(type="timeout", toxicity=0.5, attributes={"timeout": 3_000}),),
    ),
    Fault(
        name="Kafka responses break off",
        proxy="kafka",
        toxics=(Toxic(type="limit_data", toxicity=0.5, attributes={"bytes": 3_000}),),
    ),
    Fault(
        name="requests to Kafka break off",
        proxy="kafka",
        toxics=(Toxic(type="limit_data", stream="upstream", toxicity=0.5, attributes={"bytes": 3_000}),),
    ),
    Fault(
        name="Kafka is slow",
        proxy="kafka",
        toxics=(Toxic(type="latency", attributes={"latency": 800, "jitter": 700}),),
    ),
    Fault(
        name="Kafka hangs for longer than a session", proxy="kafka", duration_s=15.0, toxics=(Toxic(type="timeout"),)
    ),
    Fault(name="Kafka is down", proxy="kafka", duration_s=15.0),
)

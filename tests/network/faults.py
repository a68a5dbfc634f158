"""The faults of the network that Tripfold is put through."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import msgspec

from tests.network.toxiproxy import Toxic, Toxiproxy


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What happens between Tripfold and ``proxy``, for how long; without toxics the proxy is away."""

    name: str
    proxy: Literal["kafka", "s3"]
    toxics: tuple[Toxic, ...] = ()
    lasts_s: float = 6.0

    @property
    def breaks(self) -> bool:
        """Whether it breaks connections; if it does not, what passes is slow, and all of it arrives."""
        return not any(toxic.type == "latency" for toxic in self.toxics)

    @property
    def drawn_again(self) -> bool:
        """Whether other connections may be drawn while it lasts: the ones that were have lost nothing yet."""
        return any(toxic.toxicity < 1 and toxic.type in {"reset_peer", "limit_data"} for toxic in self.toxics)

    def lasting(self, toxiproxy: Toxiproxy, proxy: str) -> AbstractContextManager[None]:
        """Let it happen at a proxy while the block lasts."""
        return toxiproxy.poisoned(proxy, self.toxics) if self.toxics else toxiproxy.away(proxy)


FAULTS = (
    Fault(
        name="S3 resets connections",
        proxy="s3",
        toxics=(Toxic(type="reset_peer", toxicity=0.3, attributes={"timeout": 20}),),
    ),
    Fault(
        name="S3 answers break off",
        proxy="s3",
        toxics=(Toxic(type="limit_data", toxicity=0.3, attributes={"bytes": 700}),),
    ),
    Fault(
        name="requests to S3 break off",
        proxy="s3",
        toxics=(Toxic(type="limit_data", stream="upstream", toxicity=0.3, attributes={"bytes": 1_500}),),
    ),
    Fault(
        name="S3 applies and does not answer",
        proxy="s3",
        toxics=(Toxic(type="timeout", toxicity=0.3, attributes={"timeout": 1_000}),),
    ),
    Fault(
        name="S3 is slow, and comes in small pieces",
        proxy="s3",
        toxics=(
            Toxic(type="latency", attributes={"latency": 300, "jitter": 300}),
            Toxic(type="slicer", attributes={"average_size": 60, "size_variation": 30, "delay": 2_000}),
        ),
    ),
    Fault(name="S3 is away", proxy="s3", lasts_s=12.0),
    Fault(
        name="Kafka resets connections",
        proxy="kafka",
        toxics=(Toxic(type="reset_peer", toxicity=0.5, attributes={"timeout": 300}),),
    ),
    Fault(
        name="Kafka takes and does not answer",
        proxy="kafka",
        toxics=(Toxic(type="timeout", toxicity=0.5, attributes={"timeout": 3_000}),),
    ),
    Fault(
        name="answers of Kafka break off",
        proxy="kafka",
        toxics=(Toxic(type="limit_data", toxicity=0.5, attributes={"bytes": 3_000}),),
    ),
    Fault(
        name="records to Kafka break off",
        proxy="kafka",
        toxics=(Toxic(type="limit_data", stream="upstream", toxicity=0.5, attributes={"bytes": 3_000}),),
    ),
    Fault(
        name="Kafka is slow",
        proxy="kafka",
        toxics=(Toxic(type="latency", attributes={"latency": 800, "jitter": 700}),),
    ),
    Fault(
        name="Kafka is silent for longer than a session", proxy="kafka", lasts_s=15.0, toxics=(Toxic(type="timeout"),)
    ),
    Fault(name="Kafka is away", proxy="kafka", lasts_s=15.0),
)

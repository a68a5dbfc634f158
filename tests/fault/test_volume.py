"""Files of an unusual volume: counted with a mark that no later step loses, or refused."""

from __future__ import annotations

import datetime as dt

import msgspec
from msgspec import UNSET

from shared.domain import events, keys, objects
from shared.domain.contribution import Contribution
from shared.domain.events import CityDayStats
from shared.domain.ids import CityId
from shared.domain.objects import Manifest
from shared.domain.requests import Status, status_of
from shared.domain.topics import Topic
from shared.domain.volume import VolumeRules
from tests.fakes.builders import UpstreamState
from tests.fakes.metrics import value
from tests.fault.checks import live_summaries, manifests, record_of
from tests.fault.scenarios import CORRECTED, MORNING, MOVED, WHOLE
from tests.fault.world import DATE, World

CITY = CityId("1")
HALVED = UpstreamState(cities=WHOLE.cities, files={**WHOLE.files, 1: CORRECTED})
SUSPICION = "1 trips; usual on a Wednesday are 50"


class CheckingWorld(World):
    """A world whose first city had 50 trips in earlier weeks, and whose workers check volumes."""

    volume_rules = VolumeRules(trips_min=10)

    async def with_earlier_weeks(self) -> None:
        """Process DATE without a judgement, and copy the manifest of the first city to earlier weeks."""
        self.request(WHOLE)
        await self.run_to_rest()
        stored = objects.decode(Manifest, self.store.objects[keys.manifest(DATE, CITY)].body, "a manifest")
        usual = Contribution(trips=50, passengers=0, accidents=0, delay_total_ms=0)
        for weeks in (1, 2, 3):
            one = msgspec.structs.replace(stored, date=DATE - dt.timedelta(weeks=weeks), contribution=usual)
            self.store.write(keys.manifest(one.date, CITY), objects.encode(one))


class RefusingWorld(CheckingWorld):
    """A world whose workers refuse suspicious files."""

    volume_rules = VolumeRules(trips_min=10, quarantined=True)


async def test_a_suspicious_file_is_counted_with_a_mark() -> None:
    """The mark is in manifest, event, ledger and summary, and a move of the city keeps it; a usual file has none."""
    world = CheckingWorld()
    await world.with_earlier_weeks()
    assert marks(world) == [("armenia", UNSET, {"1": "", "2": ""}), ("brasil", UNSET, {"3": ""})]
    before = value("tripfold_suspicious_files_total")
    request_id = world.request(HALVED)
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert value("tripfold_suspicious_files_total") == before + 1
    found = {one.city_id: one.suspicious for one in manifests(world) if one.date == DATE}
    assert found == {"1": SUSPICION, "2": None, "3": None}
    assert marks(world) == [("armenia", 1, {"1": SUSPICION, "2": ""}), ("brasil", UNSET, {"3": ""})]
    published = [events.decode(Topic.CITY_STATS, record.value) for record in world.log.records(Topic.CITY_STATS)]
    last = [one for one in published if isinstance(one, CityDayStats) and one.city_id == CITY][-1]
    assert last.suspicious == SUSPICION
    world.request(UpstreamState(cities=MOVED, files=HALVED.files))
    await world.run_to_rest()
    assert marks(world)[1] == ("brasil", 1, {"1": SUSPICION, "3": ""})


async def test_a_suspicious_file_is_refused_if_the_rules_say_so() -> None:
    """The file goes to quarantine with the reason, and the good revision before it still counts."""
    world = RefusingWorld()
    await world.with_earlier_weeks()
    request_id = world.request(HALVED)
    await world.run_to_rest()
    (failure,) = record_of(world, request_id).failures.values()
    assert failure.reason == f"the file has {SUSPICION}"
    assert failure.quarantine_key in world.store.objects
    (manifest,) = (one for one in manifests(world) if (one.date, one.city_id) == (DATE, CITY))
    assert (manifest.contribution.trips, manifest.suspicious) == (len(MORNING), None)


def marks(world: World) -> list[tuple[str, object, dict[str, str]]]:
    """Return the number of suspicious cities and the mark of each city, by country."""
    return [
        (
            one.country,
            one.cities_suspicious,
            {city: entry.suspicious for city, entry in one.ledger.items() if entry.contribution is not None},
        )
        for one in sorted(live_summaries(world), key=lambda summary: summary.country)
        if one.date == DATE
    ]

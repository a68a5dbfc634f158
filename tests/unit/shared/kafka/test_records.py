"""The header of a record that continues a trace."""

from __future__ import annotations

from shared.domain.events import RequestFailed
from shared.domain.ids import mint_request_id, utc_now
from shared.kafka.records import OutgoingEvent, headers_of, traceparent_of

PRESENT = f"00-{1:032x}-00f067aa0ba902b7-01"
OWN = f"00-{2:032x}-00f067aa0ba902b7-01"


def test_an_event_continues_its_own_trace_or_else_the_present_one() -> None:
    """An event that a record caused earlier names its trace; others are of the present trace, or of none."""
    now = utc_now()
    event = RequestFailed(
        request_id=mint_request_id(now), date=now.date(), requested_at=now, reason="the city list is empty"
    )
    plain = headers_of(OutgoingEvent(event), source="test")
    assert traceparent_of(dict(plain)) is None
    assert headers_of(OutgoingEvent(event), source="test", traceparent=PRESENT)[:-1] == plain
    for outgoing, expected in ((OutgoingEvent(event), PRESENT), (OutgoingEvent(event, traceparent=OWN), OWN)):
        headers = headers_of(outgoing, source="test", traceparent=PRESENT)
        assert traceparent_of(dict(headers)) == expected

"""The table of alert drills."""

from __future__ import annotations

from scripts.alerts import ALERTS
from tests.alert_drill.drills import DRILLS
from tests.chaos.relay import NetworkState
from tests.chaos.s3_proxy import Fault
from tests.chaos.upstream import UpstreamFault


def test_each_fault_of_chaos_has_a_drill() -> None:
    """Each fault of S3, of the upstream and of the network is in a drill."""
    covered = {fault for drill in DRILLS for fault in drill.covers}
    assert covered == {*Fault, *UpstreamFault, NetworkState.DOWN, NetworkState.BLACKHOLED}


def test_drills_expect_alerts_that_exist() -> None:
    """A drill names an alert of the rules, and each name of a fault is in one drill."""
    assert {drill.alert for drill in DRILLS} <= {None, *(alert.name for alert in ALERTS)}
    assert len({drill.fault for drill in DRILLS}) == len(DRILLS)

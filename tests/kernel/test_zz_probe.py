from __future__ import annotations
import os, json, socket, subprocess, sys, time
import pytest
from harness import steps
from harness.routes import MULTIPATH, USUAL, V4, V6
from harness.stage import Stage
from harness.daemon import Daemon, occupancy
from harness.users import *
pytestmark = pytest.mark.kernel

@pytest.mark.parametrize("route", [V4, *MULTIPATH], ids=str)
@pytest.mark.parametrize("who", ["client_resets", "server_resets", "shutdown_both", "client_shut_first","server_shut_first"])
def test_probe(stage: Stage, route, who) -> None:
    server, client = stage.actor(SERVICE), stage.actor(ALICE)
    listener = stage.listen(server, route)
    ends = stage.connect(client, listener)
    accepted = server(steps.accept, listener.fds)
    before = occupancy(stage.client)
    if who == "client_resets":
        client(steps.reset, ends.tcp); server(steps.wait_until_hung_up, accepted.tcp)
        time.sleep(.1)
        mid = occupancy(stage.client)
        server(steps.close, (accepted.tcp,))
    elif who == "server_resets":
        server(steps.reset, accepted.tcp); client(steps.wait_until_hung_up, ends.tcp)
        time.sleep(.1)
        mid = occupancy(stage.client)
        client(steps.close, (ends.tcp,))
    elif who == "shutdown_both":
        client(steps.shutdown, ends.tcp, 2); server(steps.shutdown, accepted.tcp, 2)
        time.sleep(.1)
        mid = occupancy(stage.client)
        client(steps.close, (ends.tcp,)); server(steps.close, (accepted.tcp,))
    elif who == "client_shut_first":
        client(steps.shutdown, ends.tcp, 1); server(steps.close, (accepted.tcp,))
        time.sleep(.1)
        mid = occupancy(stage.client)
        client(steps.close, (ends.tcp,))
    else:
        server(steps.shutdown, accepted.tcp, 1); client(steps.close, (ends.tcp,))
        time.sleep(.1)
        mid = occupancy(stage.client)
        server(steps.close, (accepted.tcp,))
    time.sleep(.3)
    print("PROBE", route, who, before, mid, occupancy(stage.client))

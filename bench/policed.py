"""One service on two ports of loopback: one asks who calls, and one lets everybody see all.

Both are in one process, and are called in turns.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import grpc.aio

from bench.child import answer
from peercredd.access import Policy
from peercredd.events import Events
from peercredd.figures import Figures
from peercredd.processes import Processes
from peercredd.server import (
    MAX_CONCURRENT_TCP_CALLS,
    MAX_OPEN_TCP_STREAMS,
    TCP_OPTIONS,
    Gate,
    LoopbackTcp,
    Places,
    handlers,
    serving,
)
from peercredd.service import PeerCredentialsService
from peercredd.store import Store
from peercredd.watching import Hub

WITH_POLICY, WITHOUT = 338, 339
"""Ports, in the benchmark's own network namespace."""


async def _serve(pin_dir: Path, folder: str) -> None:
    with closing(Store(pin_dir)) as store, Events(pin_dir) as events:
        hub = Hub(store, events)
        policy = Policy.of("root", (), (), listener_details=False)
        # As the daemon makes it: for each call of a caller who is asked, and once for all others.
        service = functools.partial(
            PeerCredentialsService, processes=Processes(), daemon_pid=os.getpid(), figures=Figures()
        )
        to_all = service(store)
        unasked = Gate(
            lambda _context, _lists: to_all,
            Places(MAX_OPEN_TCP_STREAMS),
            counts_early=False,
        )
        server = grpc.aio.server(
            handlers=handlers(store, hub, unasked),
            options=TCP_OPTIONS,
            maximum_concurrent_rpcs=MAX_CONCURRENT_TCP_CALLS,
        )
        server.add_insecure_port(f"127.0.0.1:{WITHOUT}")
        async with serving(
            store,
            hub,
            f"{folder}/socket",
            tcp=LoopbackTcp(store, WITH_POLICY, policy),
            service=service,
        ):
            await server.start()
            answer("serving")
            await asyncio.to_thread(sys.stdin.read)
            await server.stop(None)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_serve(Path(sys.argv[1]), folder))

"""Connections that come and go while a test does something else to the daemon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import steps, turnover
from harness.actors import Actor
from harness.routes import V4
from harness.so_peercred import Credentials

PAUSE_SECONDS = 0.005
"""Between connections: others work, too."""
Told = Counter[Credentials]
"""What SO_PEERCRED told, and how often."""


@contextmanager
def turning_over(
    server: Actor, client: Actor, pause_seconds: float = PAUSE_SECONDS
) -> Iterator[Told]:
    """Have one actor connect to another, again and again, which asks SO_PEERCRED of each.

    Both are busy with it until the block ends; what was told is there then.
    """
    told = Told()
    fds = server(steps.bind, V4)
    server(steps.listen, fds)
    target = server(steps.addresses, fds, V4).tcp
    with TemporaryDirectory(prefix="peercredd-test-") as folder:
        Path(folder).chmod(0o755)
        ended = Path(folder) / "ended"
        asking = server.start(turnover.ask_until_the_last, fds.tcp)
        connecting = client.start(turnover.connect_until, str(ended), target, pause_seconds)
        try:
            yield told
        finally:
            ended.touch()
            count = connecting.result()
            told += asking.result()
    server(steps.close, fds)
    assert told.total() == count

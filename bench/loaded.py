"""A process that keeps a hook set loaded, and attaches and detaches it when told.

Nothing reads what is captured: what it costs, it costs the tasks that it captures. It
ends when standard input does.
"""

from __future__ import annotations

import os
import sys

from bench.child import answer, orders
from peercredd import capture, defaults


def _obey(hook_set: str, cgroup: str) -> None:
    loaded = capture.load(hook_set, defaults.MAX_CONNECTIONS, defaults.MAX_PENDING)
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    links: list[int] = []
    answer("loaded")
    for attach in orders():
        if attach:
            links += [each.attach(fd, directory) for each, fd in loaded.programs.items()]
            answer(None)
        else:
            while links:
                os.close(links.pop())
            answer((0.0, 0))


if __name__ == "__main__":
    _obey(*sys.argv[1:])

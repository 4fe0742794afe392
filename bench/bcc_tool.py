"""One of BCC's own tools, run as it is installed, but that its probes come and go when told.

Its start costs the compiler seconds: too many to start it for each turn. It ends when
standard input does.
"""

from __future__ import annotations

import os
import runpy
import select
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import bcc
from bcc.table import PerfEventArray

from bench.child import answer, orders

IDLE_MILLISECONDS = 50


class _Switched(bcc.BPF):  # type: ignore[misc]
    """What the tool gets for a BPF."""

    answers: TextIO
    events = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._orders = orders()
        self._probes: list[tuple[str, bytes, bytes]] = []
        self._begin = (0.0, 0)

    def perf_buffer_poll(self, timeout: int = IDLE_MILLISECONDS) -> None:
        """What the tool does for ever. Orders wait until there is no event to read."""
        if not self._probes:
            # BCC calls a probe by its kind and its function: p_tcp_v4_connect, r_...
            self._probes = [
                ("kprobe" if name.startswith(b"p_") else "kretprobe", name[2:], program)
                for name, programs in self.kprobe_fds.items()
                for program in programs
            ]
            self._switch("detach")
            answer("loaded", self.answers)
        events = self.events
        super().perf_buffer_poll(timeout)
        if self.events == events and select.select([sys.stdin], [], [], 0)[0]:
            self._obey(next(self._orders, None))

    def _obey(self, attach: bool | None) -> None:
        if attach is None:
            os._exit(0)  # BCC takes what it mapped apart in no order, and complains
        if attach:
            self._switch("attach")
            self._begin = (time.process_time(), self.events)
            answer(None, self.answers)
        else:
            cpu_seconds, events = self._begin
            reading = (time.process_time() - cpu_seconds, self.events - events)
            self._switch("detach")
            answer(reading, self.answers)

    def _switch(self, what: str) -> None:
        for kind, function, program in self._probes:
            getattr(self, f"{what}_{kind}")(event=function, fn_name=program)


def _counted(open_perf_buffer: Callable[..., None]) -> Callable[..., None]:
    def open_and_count(table: Any, callback: Callable[..., None], **options: Any) -> None:
        def count(*event: Any) -> None:
            table.bpf.events += 1
            callback(*event)

        open_perf_buffer(table, count, **options)

    return open_and_count


def _run(tool: str) -> None:
    _Switched.answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    PerfEventArray.open_perf_buffer = _counted(PerfEventArray.open_perf_buffer)
    bcc.BPF = _Switched
    sys.argv = sys.argv[1:]
    runpy.run_path(tool, run_name="__main__")


if __name__ == "__main__":
    _run(sys.argv[1])

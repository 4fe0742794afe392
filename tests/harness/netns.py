"""Network namespaces of the tests' own, where addresses and sysctls can be changed."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from harness.patience import patient
from harness.syscalls import CLONE_NEWNET, syscall

WAIT_SECONDS = patient(30)

P = ParamSpec("P")
R = TypeVar("R")


class NetworkNamespace:
    """A network namespace with nothing in it but a loopback device that is up."""

    def __init__(self) -> None:
        self.fd = _in_new_thread(self._make)
        self.command("ip", "link", "set", "lo", "up")

    @staticmethod
    def _make() -> int:
        syscall("unshare", CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    def run(self, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """Call a function in the namespace; raises what it raises."""

        def inside() -> R:
            syscall("setns", self.fd, CLONE_NEWNET)
            return function(*arguments, **named)

        return _in_new_thread(inside)

    def command(self, *arguments: str) -> None:
        """Run a program in the namespace; raises CalledProcessError."""
        self.run(subprocess.run, arguments, check=True)

    def sysctl(self, name: str, value: int) -> None:
        """Set a sysctl that each namespace has for itself."""
        self.run((Path("/proc/sys") / name.replace(".", "/")).write_text, str(value))

    def counter(self, group: str, name: str) -> int:
        """A counter of /proc/net/netstat."""
        text = self.run(Path("/proc/thread-self/net/netstat").read_text)
        names, values = (line.split() for line in text.splitlines() if line.startswith(f"{group}:"))
        return int(values[names.index(name)])

    def wait_for_counter(self, group: str, name: str) -> None:
        """Wait until a counter of /proc/net/netstat is not 0."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.counter(group, name):
            assert time.monotonic() < deadline, f"{group} {name} is still 0"
            os.sched_yield()

    def add_address(self, address: str, device: str = "lo") -> None:
        """Give the namespace an address of its own, with its prefix length; at once usable."""
        nodad = ["nodad"] if ":" in address else []
        self.command("ip", "address", "add", address, "dev", device, *nodad)

    def connect_to(self, other: NetworkNamespace, here: str, there: str) -> None:
        """Lay a cable to another namespace: a device `cable` on each side, that is up."""
        peer = f"/proc/self/fd/{other.fd}"
        self.run(
            subprocess.run,
            ["ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", peer],
            check=True,
            pass_fds=[other.fd],
        )
        for namespace, address in ((self, here), (other, there)):
            namespace.add_address(address, "cable")
            namespace.command("ip", "link", "set", "cable", "up")
        for namespace in (self, other):
            namespace.wait_until_up("cable")

    def wait_until_up(self, device: str) -> None:
        """Wait until a device carries: an IPv6 address that it has before is not routed yet."""
        deadline = time.monotonic() + WAIT_SECONDS
        show = ["ip", "-oneline", "link", "show", device]
        while " state UP " not in self.run(subprocess.check_output, show, text=True):
            assert time.monotonic() < deadline, f"{device} has no carrier"

    def close(self) -> None:
        """Let go of the namespace; the kernel removes it after its last socket and process."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> NetworkNamespace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _in_new_thread(function: Callable[[], R]) -> R:
    """Call a function where entering a namespace changes nothing for anybody else."""
    answers: list[R] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return answers[0]

"""Tells who has started the daemon how it is: sd_notify(3), the protocol of systemd."""

from __future__ import annotations

import os
import socket

import structlog

log = structlog.get_logger()


class Notifier:
    """Where systemd is told, if it asked to be."""

    def __init__(self) -> None:
        """Take the request out of the environment: no child is to speak for the daemon.

        systemctl does when it ends, and has no part in what the daemon is (seen with systemd 257).
        """
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        self._has_watchdog = bool(os.environ.pop("WATCHDOG_USEC", ""))
        os.environ.pop("WATCHDOG_PID", None)

    def alive(self) -> None:
        """Tell that the daemon lives, if that is watched."""
        if self._has_watchdog:
            self.tell("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Tell how the daemon is, for `systemctl status`."""
        self.tell(f"STATUS={' '.join(text.split())}")

    def tell(self, state: str) -> None:
        """Tell a state, as sd_notify(3) writes it."""
        address = self._address
        if not address:
            return
        if address.startswith("@"):  # abstract: unix(7) writes it with a NUL
            address = "\0" + address[1:]
        try:
            kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            with socket.socket(socket.AF_UNIX, kind) as channel:
                channel.sendto(state.encode(), address)
        except OSError as error:
            log.warning("systemd cannot be told", state=state, reason=error.strerror)

"""What can go wrong when you ask who is at the other end."""

from __future__ import annotations


class PeerCredError(Exception):
    """Every error this library raises on purpose derives from this."""


class NotFound(PeerCredError):  # noqa: N818 - reads as the answer it is
    """Nothing is known of that connection. Never to be taken for uid 0.

    `reason` says why, in the words of google.rpc.ErrorInfo:

    - ``NEVER_SEEN``: no local connect() of that connection was recorded, or
      its server socket is not born yet.
    - ``OLDER_THAN_CAPTURE``: it, or the listener asked about, was there before capture began.
    - ``TABLE_WAS_FULL``: it was seen, and there was no room to record it, in a table or in
      one user's share of it.
    - ``RETIRED``: it was recorded, and both ends have been closed since.
    - ``NOT_LOCAL``: its other end is not on this host.
    - ``NOT_VISIBLE``: any of these, or it is not yours to learn about: over loopback TCP
      the daemon does not say which to who may not see all.
    - ``""``: the daemon did not say.
    """

    # The default is for pickle, which makes the error from its text and then sets the rest.
    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class InvalidArgument(PeerCredError, ValueError):  # noqa: N818
    """The question makes no sense; `field` names the part that is wrong ('' if unknown)."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Unavailable(PeerCredError):  # noqa: N818
    """No daemon answers; the text says how to start one."""


class DeadlineExceeded(Unavailable):
    """The daemon did not answer within the timeout."""


class Refused(PeerCredError):  # noqa: N818
    """You may not ask, or must not believe who would answer.

    The daemon or its socket's permissions do not let you; or who serves there is neither
    root nor the daemon's user.
    """

"""How long the tests wait for what has to happen. A slow machine is given more time.

PEERCREDD_TIMEOUT_FACTOR, 1 by default, multiplies every deadline: a virtual machine that
is emulated needs 5 or so.
"""

from __future__ import annotations

import os

FACTOR = float(os.environ.get("PEERCREDD_TIMEOUT_FACTOR", "1"))


def patient(seconds: float) -> float:
    """A deadline, for the machine that this is."""
    return seconds * FACTOR


CALL_SECONDS = patient(5)
"""For one call of the daemon."""

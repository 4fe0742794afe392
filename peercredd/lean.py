"""What a process that runs for long does not carry."""

from __future__ import annotations

import sys


def leave_out() -> None:
    """Have libraries do without what they would import and nothing here uses: 8 MB.

    structlog imports rich, and asyncio ssl, where they are installed. Comes before either.
    """
    # None says "not installed".
    sys.modules.update(dict.fromkeys(("rich", "ssl")))  # type: ignore[arg-type]

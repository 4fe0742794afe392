"""What a process that runs for long does not carry."""

from __future__ import annotations

import sys


def leave_out() -> None:
    """Have libraries do without what they would import and nothing here uses: 8 MB.

    structlog imports rich, and asyncio ssl, where they are installed. Comes before either.
    """
    # None says "not installed".
    sys.modules.update(dict.fromkeys(("rich", "ssl")))  # type: ignore[arg-type]


def let_in(library: str) -> None:
    """Let a library that was left out be imported after all."""
    if sys.modules.get(library, library) is None:
        del sys.modules[library]

"""What a process does not carry: modules that it would import and never use."""

from __future__ import annotations

import importlib.util
import sys


def leave_out() -> None:
    """Have libraries do without what they would import and nothing here uses.

    structlog imports rich, and asyncio ssl, where they are installed: 8 MB. The package of
    pyroute2 imports each of its modules: a quarter of a second. Comes before any of them.
    """
    # None says "not installed".
    sys.modules.update(dict.fromkeys(("rich", "ssl")))  # type: ignore[arg-type]
    if package := importlib.util.find_spec("pyroute2"):
        # Modules are found in the package, of which nothing has been run.
        sys.modules["pyroute2"] = importlib.util.module_from_spec(package)


def let_in(library: str) -> None:
    """Let a library that was left out be imported after all."""
    if sys.modules.get(library, library) is None:
        del sys.modules[library]

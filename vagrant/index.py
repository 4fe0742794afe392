"""How a machine reaches the package index that this one uses."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

UV_NAMES = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_DEFAULT_TIMEOUT": "UV_HTTP_TIMEOUT",
    "PIP_TRUSTED_HOST": "UV_INSECURE_HOST",
}
"""What uv calls those of pip's settings that it has as well."""
HOST_OF_GUEST = "10.0.2.2"
"""Where a guest on QEMU's user network finds this machine's loopback."""


def settings() -> tuple[dict[str, str], Path | None]:
    """Return the environment for pip and uv in a guest, and the CA bundle for it, if any.

    What names a file or folder of this machine is left out: the guest has none of them.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    environment: dict[str, str] = {}
    bundle = None
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.partition(".")
        if section not in ("global", "install", ":env:"):
            continue
        words = str(ast.literal_eval(value)).split()
        if option == "cert":
            bundle = Path(words[0])
        elif remote := [word for word in words if not word.startswith(("/", "file:", "~", "."))]:
            environment[f"PIP_{option.removeprefix('.').upper().replace('-', '_')}"] = " ".join(
                remote
            )
    environment |= {
        of_uv: environment[name] for name, of_uv in UV_NAMES.items() if name in environment
    }
    # As pip does: the best version that any index has.
    environment["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    for name, value in os.environ.items():
        if name.lower().endswith("_proxy"):
            environment[name] = re.sub(r"(?<=//)(localhost|127\.0\.0\.1)\b", HOST_OF_GUEST, value)
    return environment, bundle

"""Processes of the benchmark's own: a module run by Python, told and heard in lines of JSON.

They end when their standard input does, so also when the benchmark is killed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, TextIO

import click


class Child:
    """``python -m MODULE ARGUMENTS...``, as a context manager."""

    def __init__(self, module: str, *arguments: object) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the benchmark, which ends its children in their order.
            process_group=0,
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def tell(self, message: object) -> None:
        """Send it one line."""
        assert self._process.stdin is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)

    def hear(self) -> Any:
        """Wait for its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"{self._module} failed; its own message is above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error:
            self._process.terminate()  # what it has been told may take half an hour
        self._process.__exit__(kind, error, traceback)


def orders() -> Iterator[Any]:
    """In the child: what it is told, until it is to end."""
    return map(json.loads, sys.stdin)


def answer(message: object, to: TextIO | None = None) -> None:
    """In the child: be heard. `to` is standard output, should that lead elsewhere by now."""
    print(json.dumps(message), file=to, flush=True)

"""How the daemon writes its log: to stderr, one line an event.

Some of what is logged was chosen by strangers: names, paths, what a request asked for. In text
none of it can end a line, begin one that looks like an event, or command a terminal.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog(3) levels."""


def configure(level: str, form: Literal["auto", "text", "json"]) -> None:
    """Send structlog, and the logging that asyncio and gRPC use, to stderr.

    `level` and `form` are ``log.level`` and ``log.format``. A journal gets the
    priority of each line as sd-daemon(3) has it, in either form.
    """
    journal = _stderr_is_journal()
    terminal = sys.stderr.isatty()
    if form == "auto":
        form = "text" if journal or terminal else "json"
    shared: list[Processor] = [structlog.stdlib.add_log_level]
    if not journal:
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    render: Processor
    if form == "json":
        shared.append(structlog.processors.format_exc_info)
        render = structlog.processors.JSONRenderer()
    else:
        render = structlog.dev.ConsoleRenderer(
            colors=terminal,
            pad_event_to=0,
            sort_keys=False,
            exception_formatter=_traceback,
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _headline_first,
                *(() if form == "json" else (_inert,)),
                _WithPriority(render) if journal else render,
            ],
        )
    )
    least = logging.getLevelNamesMapping()[level.upper()]
    # Below warning, what libraries say is of no use to who runs the daemon.
    logging.basicConfig(handlers=[handler], level=max(least, logging.WARNING), force=True)
    logging.getLogger("peercredd").setLevel(least)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _stderr_is_journal() -> bool:
    """Whether stderr is still what systemd connected, see JOURNAL_STREAM in systemd.exec(5)."""
    stderr = os.fstat(sys.stderr.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


def _headline_first(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    headline = {key: event.pop(key) for key in ("event", "level", "timestamp") if key in event}
    return {**headline, **event}


class _Quoted:
    """A text that is written as Python would."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return repr(self._text)


def _inert(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Escape what cannot be printed; JSON does so by itself."""
    headline = _escaped(str(event.pop("event", "")))
    return {"event": headline} | {
        _escaped(key): _Quoted(value)
        if isinstance(value, str) and not value.isprintable()
        else value
        for key, value in event.items()
    }


def _escaped(text: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _traceback(stream: TextIO, exc_info: ExcInfo) -> None:
    """Write a traceback whose lines are all indented, so that none can be taken for an event."""
    text = "".join(traceback.format_exception(*exc_info)).rstrip("\n")
    stream.writelines("\n  " + _escaped(line) for line in text.split("\n"))


class _WithPriority:
    def __init__(self, render: Processor) -> None:
        self._render = render

    def __call__(self, logger: WrappedLogger, name: str, event: EventDict) -> str:
        prefix = f"<{_PRIORITIES[event.pop('level')]}>"
        # Each line of a traceback is an entry of its own to the journal.
        lines = str(self._render(logger, name, event)).splitlines()
        return "\n".join(prefix + line for line in lines)

"""How the daemon writes its log: to stderr, one line an event, or to the journal with fields.

Some of what is logged was chosen by strangers: names, paths, what a request asked for. In text
none of it can end a line, begin one that looks like an event, or command a terminal.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from contextlib import suppress
from typing import Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from peercredd import journal
from peercredd.journal import Journal

_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog(3) levels."""

_PRIORITY_PREFIX: Final = re.compile(r"^<\d>", re.MULTILINE)
_NO_FIELDS: Final = {"event", "level", "exc_info", "stack_info"}


def configure(level: str, form: Literal["auto", "text", "json"]) -> None:
    """Send structlog, and the logging that asyncio and gRPC use, to stderr.

    `level` and `form` are ``log.level`` and ``log.format``. Where stderr is the journal,
    an entry gets its priority, and by ``auto`` each value as a field besides: written
    past stderr, or as lines with sd-daemon(3)'s prefixes where that cannot be.
    """
    in_journal = journal.is_stderr()
    terminal = sys.stderr.isatty()
    with_fields = form == "auto"
    if with_fields:
        form = "text" if in_journal or terminal else "json"
    shared: list[Processor] = [structlog.stdlib.add_log_level]
    if not in_journal:
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
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if in_journal and with_fields:
        with suppress(OSError):
            handler = _JournalHandler(Journal(), handler)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _headline_first,
                *(() if form == "json" else (_inert,)),
                _WithPriority(render) if in_journal else render,
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


class _JournalHandler(logging.Handler):
    """Sends to the journal what it can, and leaves the rest to stderr."""

    def __init__(self, to: Journal, otherwise: logging.Handler) -> None:
        super().__init__()
        self._journal = to
        self._otherwise = otherwise

    def setFormatter(self, formatter: logging.Formatter | None) -> None:  # noqa: N802 - its base's
        """Format likewise what goes to stderr."""
        super().setFormatter(formatter)
        self._otherwise.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        """Write an entry."""
        # What structlog hands on is the event with all its values.
        values = record.msg if isinstance(record.msg, dict) else {}
        fields = {name: values[name] for name in values if name not in _NO_FIELDS}
        message = _PRIORITY_PREFIX.sub("", self.format(record))
        try:
            self._journal.send(message, _PRIORITIES[record.levelname.lower()], fields)
        except OSError:
            self._otherwise.handle(record)

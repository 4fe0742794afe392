"""The configuration: defaults, overridden by a TOML file, overridden by flags."""

from __future__ import annotations

import difflib
import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from peercredd import defaults, targets


class ConfigError(Exception):
    """The configuration cannot be used. One line: where, which option, what is allowed."""


_ABSOLUTE = r"/[^\x00-\x1f\ud800-\udfff]*"
"""Surrogates are how Python writes bytes that are no UTF-8."""


_ACCOUNT = r"\A[^\s:/\x00]+\Z"
"""The name of a user or group."""
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(\.{_OCTET}){{3}}"
_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6([0-4][0-9]{3}|5([0-4][0-9]{2}|5([0-2][0-9]|3[0-5]))))"
_LONGEST_FILE = 1 << 20
"""Bytes. The file with every option and its comment has 6,000."""


def _option(
    help_text: str, allowed: str, *, metavar: str | None = None, **constraints: Any
) -> msgspec.Meta:
    extra = {"allowed": allowed, "metavar": metavar}
    return msgspec.Meta(description=help_text, extra=extra, **constraints)


def _path(help_text: str) -> msgspec.Meta:
    return _option(
        help_text, "an absolute path in UTF-8", metavar="PATH", pattern=rf"\A{_ABSOLUTE}\Z"
    )


def _number(help_text: str, low: int, high: int) -> msgspec.Meta:
    return _option(help_text, f"a whole number from {low} to {high}", metavar="N", ge=low, le=high)


class _Table(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Capture(_Table, frozen=True):
    """What the kernel side records, and where it is kept."""

    pin_dir: Annotated[
        str,
        _path("Folder on a bpffs where maps and attachments are pinned; mounted at /sys/fs/bpf."),
    ] = defaults.PIN_DIR
    cache_dir: Annotated[
        str,
        _path(
            "Folder of root's own where compiled programs are kept, so that the next start is "
            "quicker. It may be emptied at any time."
        ),
    ] = defaults.CACHE_DIR
    hooks: Annotated[
        Literal["auto", "trace", "cgroup"],
        _option(
            "Hook set that captures. trace records who accepted, too; cgroup works on kernels "
            "that let nothing trace them. auto is trace where that works, else cgroup.",
            "auto, trace or cgroup",
        ),
    ] = defaults.HOOKS
    cgroup: Annotated[
        str,
        _option(
            "Record connections made in this cgroup v2 directory and below it only. "
            '"root" is the whole host, wherever cgroup v2 is mounted.',
            'an absolute path in UTF-8, or "root"',
            metavar="PATH",
            pattern=rf"\A(root|{_ABSOLUTE})\Z",
        ),
    ] = defaults.CGROUP
    max_connections: Annotated[
        int, _number("Established connections recorded at the same time.", 1, 16_777_216)
    ] = defaults.MAX_CONNECTIONS
    max_pending: Annotated[
        int,
        _number("Connections under way at the same time: SYN sent, not yet established.", 1, 2**24),
    ] = defaults.MAX_PENDING
    max_percent_per_user: Annotated[
        int,
        _number(
            "How much of each table one user may take, in percent. Beyond that only this user's "
            "new connections are not recorded. 100 lets one user fill them.",
            1,
            100,
        ),
    ] = defaults.MAX_PERCENT_PER_USER
    keep: Annotated[
        bool,
        _option(
            "On a clean stop leave the capture running: connections made while the daemon is "
            "down are recorded. 'peercredd unload' ends it.",
            "true or false",
        ),
    ] = False


class Api(_Table, frozen=True):
    """Where questions are asked."""

    socket: Annotated[str, _path("Unix socket for gRPC. Its folder is made if it is missing.")] = (
        defaults.SOCKET
    )
    group: Annotated[
        str,
        _option(
            "Group that may ask, besides root. The socket is root:GROUP, mode 0660.",
            "the name of a group",
            metavar="GROUP",
            pattern=_ACCOUNT,
        ),
    ] = defaults.GROUP
    user: Annotated[
        str,
        _option(
            "User that the process becomes which answers. Not root; where there is no such user, "
            "nobody.",
            "the name of a user",
            metavar="USER",
            pattern=_ACCOUNT,
        ),
    ] = defaults.USER
    tcp: Annotated[
        bool,
        _option(
            "Serve on loopback TCP too, at 127.0.0.1 and ::1, for everybody: callers are looked up "
            "like any other connection, and who may not see all learns about its own.",
            "true or false",
        ),
    ] = defaults.TCP
    tcp_port: Annotated[
        int,
        _number(
            "Port there. From 1024 on, any user can take it while the daemon is down.", 1, 65_535
        ),
    ] = defaults.TCP_PORT


class Access(_Table, frozen=True):
    """Who may learn what over loopback TCP."""

    users: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=_ACCOUNT)]],
        _option(
            "User that learns about every connection over loopback TCP, too, besides root: its "
            "name or uid.",
            "a list of users, each a name or a uid",
            metavar="USER",
        ),
    ] = []
    groups: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=_ACCOUNT)]],
        _option(
            "Group whose members learn about every connection over loopback TCP, too, besides "
            "api.group: its name or gid.",
            "a list of groups, each a name or a gid",
            metavar="GROUP",
        ),
    ] = []
    listener_details: Annotated[
        bool,
        _option(
            "Tell a client all about another user's listener that it is connected to: its name, "
            "capabilities, cgroup and so on. Without, only what SO_PEERCRED and SO_PEERGROUPS "
            "would tell it on a unix socket: pid, uid, gid and groups.",
            "true or false",
        ),
    ] = False


class SoPeercred(_Table, frozen=True):
    """Where getsockopt(SO_PEERCRED) works on TCP sockets."""

    cgroups: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=targets.PATTERN)]],
        _option(
            "Answer getsockopt(SO_PEERCRED) and SO_PEERGROUPS on TCP sockets that were created in "
            "this cgroup or below: its absolute path, a systemd unit such as postgresql.service, "
            'or "all" for all that is captured. What is not there yet is waited for.',
            f"a list of targets, each {targets.ALLOWED}",
            metavar="TARGET",
        ),
    ] = []
    state: Annotated[
        str,
        _path(
            "File that remembers what 'peercredd so-peercred enable' was told. Its folder is made "
            "if it is missing."
        ),
    ] = defaults.SO_PEERCRED_STATE


class Sweep(_Table, frozen=True):
    """How records no socket stands behind are removed."""

    interval_seconds: Annotated[int, _number("Time between two sweeps.", 1, 86_400)] = (
        defaults.SWEEP_INTERVAL_SECONDS
    )
    pending_age_seconds: Annotated[
        int, _number("Connections under way are looked at when they are older.", 1, 86_400)
    ] = defaults.PENDING_AGE_SECONDS
    record_age_seconds: Annotated[
        int, _number("Established connections are looked at when they are older.", 1, 86_400)
    ] = defaults.RECORD_AGE_SECONDS


class Metrics(_Table, frozen=True):
    """Figures for Prometheus."""

    address: Annotated[
        str,
        _option(
            "Serve http://HOST:PORT/metrics for Prometheus, such as 127.0.0.1:9338. Whoever can "
            'connect there can read it: how much is going on, and not who does it. "" is nowhere.',
            'an address and a port such as 127.0.0.1:9338 or [::1]:9338, or ""',
            metavar="HOST:PORT",
            pattern=rf"\A(|{_IPV4}:{_PORT}|\[[0-9a-fA-F:.]+\]:{_PORT})\Z",
        ),
    ] = defaults.METRICS_ADDRESS


class Log(_Table, frozen=True):
    """What is written to stderr."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _option("The least that is written.", "debug, info, warning or error"),
    ] = defaults.LOG_LEVEL
    format: Annotated[
        Literal["auto", "text", "json"],
        _option(
            "auto is text on a terminal and in the journal, json elsewhere.", "auto, text or json"
        ),
    ] = defaults.LOG_FORMAT


class Config(_Table, frozen=True):
    """All options, checked."""

    capture: Capture = Capture()
    api: Api = Api()
    access: Access = Access()
    so_peercred: SoPeercred = SoPeercred()
    sweep: Sweep = Sweep()
    metrics: Metrics = Metrics()
    log: Log = Log()


_NAMING_TABLES = ("metrics", "access", "sweep", "log", "so_peercred")
"""Tables whose options' names say little without them."""


class Option(NamedTuple):
    """One option, as its field declares it."""

    table: str
    name: str
    type: Any
    default: Any
    help: str
    allowed: str
    metavar: str | None
    """How --help writes its value: PATH, N, GROUP, USER; None where the type says it."""

    @property
    def key(self) -> str:
        """``table.name``, which is also valid TOML."""
        return f"{self.table}.{self.name}"

    @property
    def is_list(self) -> bool:
        """Whether its flag may be repeated."""
        return isinstance(self.default, list)

    @property
    def flag(self) -> str:
        """What it is called on the command line, where ``--level`` or ``--interval`` say little."""
        words = self.key if self.table in _NAMING_TABLES else self.name
        if self.is_list:  # each time it is given, one of them
            words = self.table if self.table == "so_peercred" else self.key.removesuffix("s")
        return "--" + words.replace("_", "-").replace(".", "-")


def _declared_options() -> Iterator[Option]:
    for table in msgspec.structs.fields(Config):
        for field in msgspec.structs.fields(table.type):
            (meta,) = field.type.__metadata__
            yield Option(
                table=table.name,
                name=field.name,
                type=field.type,
                # msgspec makes a new list each time.
                default=[] if field.default is msgspec.NODEFAULT else field.default,
                help=meta.description,
                **meta.extra,
            )


OPTIONS: Mapping[str, Option] = {option.key: option for option in _declared_options()}
TABLES = tuple(table.name for table in msgspec.structs.fields(Config))


class Effective(NamedTuple):
    """A configuration, and where each value comes from."""

    config: Config
    sources: Mapping[str, str]
    """By option key: ``default``, ``file:PATH`` or ``flag:--NAME``."""

    def values(self) -> Iterator[tuple[str, str | int | bool | list[str], str]]:
        """Key, value and source of every option."""
        for key, option in OPTIONS.items():
            yield key, getattr(getattr(self.config, option.table), option.name), self.sources[key]


def load(file: Path | None, flags: Mapping[str, str | bool | list[str]]) -> Effective:
    """Merge defaults, file and flags.

    `file` None is the default file, which may be missing; a file that is named must
    be there. `flags` has option keys; a number may be given as text, a list replaces the
    file's.

    Raises:
        ConfigError: something in them cannot be used.
    """
    values = {key: option.default for key, option in OPTIONS.items()}
    sources = dict.fromkeys(OPTIONS, "default")
    path = file or Path(defaults.CONFIG_FILE)
    for key, value in _read(path, may_be_missing=file is None):
        values[key] = _checked(f"{path}: {key}", OPTIONS[key], value, strict=True)
        sources[key] = f"file:{path}"
    for key, value in flags.items():
        option = OPTIONS[key]
        values[key] = _checked(option.flag, option, value, strict=False)
        sources[key] = f"flag:{option.flag}"
    tables: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    for key, option in OPTIONS.items():
        tables[option.table][option.name] = values[key]
    return Effective(msgspec.convert(tables, Config), sources)


def _read(path: Path, *, may_be_missing: bool) -> Iterator[tuple[str, Any]]:
    """Yield key and unchecked value of every option that the file sets."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_LONGEST_FILE + 1)
    except FileNotFoundError:
        if may_be_missing:
            return
        raise ConfigError(f"{path}: no such file; name one that exists with --config") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; mend that, or name another with --config"
        ) from error
    if len(text) > _LONGEST_FILE:
        raise ConfigError(f"{path}: longer than a megabyte; name a configuration with --config")
    try:
        document = tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; TOML has to be") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}; mend that line") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply; no option is nested in another") from error
    except ValueError as error:  # int() of a few thousand digits
        raise ConfigError(f"{path}: a number is too long to be read; shorten it") from error
    for table, content in document.items():
        if table not in TABLES:
            what = "table" if isinstance(content, dict) else "option"
            raise ConfigError(f"{path}: {_shown(table)}: unknown {what}{_near_miss(table)}")
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: {table}: has to be a table, written [{table}]")
        for name, value in content.items():
            key = f"{table}.{name}"
            if key not in OPTIONS:
                raise ConfigError(f"{path}: {_shown(key)}: unknown option{_near_miss(key)}")
            yield key, value


def _checked(where: str, option: Option, value: object, *, strict: bool) -> Any:
    try:
        return msgspec.convert(value, option.type, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_shown(value)} is not {option.allowed}") from error


def _near_miss(key: str) -> str:
    """End the sentence about an unknown table or option with what was probably meant."""
    table, _, name = key.rpartition(".")
    same_name = [known for known, option in OPTIONS.items() if option.name == name]
    known = [*TABLES, *OPTIONS]
    if same_name or (close := difflib.get_close_matches(key, known, n=1)):
        return f"; did you mean {(same_name or close)[0]}?"
    if table:
        names = [option.name for option in OPTIONS.values() if option.table == table]
        return f"; [{table}] has {', '.join(names)}"
    return f"; there are the tables {', '.join(TABLES)}"


_quoting = reprlib.Repr()
_quoting.maxstring = 100


def _shown(value: object) -> str:
    """Quote for a message of one line, however long or strange the value."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return _quoting.repr(value)
    except ValueError:  # an int with more digits than Python writes
        return "a number of thousands of digits"

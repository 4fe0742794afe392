import re
import tomllib
from pathlib import Path

import pytest

from peercredd import config, defaults
from peercredd.config import OPTIONS, TABLES, ConfigError, load

EXAMPLE = Path(__file__).parents[2] / "packaging" / "peercredd.toml"


@pytest.fixture(autouse=True)
def no_file_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(defaults, "CONFIG_FILE", str(tmp_path / "missing.toml"))


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "peercredd.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refusal(folder: Path, text: str | bytes) -> str:
    """What is said of that file, after its name."""
    file = write(folder, text)
    with pytest.raises(ConfigError) as refused:
        load(file, {})
    message = str(refused.value)
    assert message.startswith(f"{file}: ")
    assert message.isprintable()
    return message.removeprefix(f"{file}: ")


def test_without_a_file_every_value_is_the_default() -> None:
    effective = load(None, {})

    assert effective.config == config.Config()
    assert set(effective.sources.values()) == {"default"}


def test_the_default_file_is_read_where_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, 'log.level = "debug"')
    monkeypatch.setattr(defaults, "CONFIG_FILE", str(file))

    effective = load(None, {})

    assert effective.config.log.level == "debug"
    assert effective.sources["log.level"] == f"file:{file}"


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, "[capture]\nmax_connections = 10\nmax_pending = 20\nkeep = true\n")

    effective = load(file, {"capture.max_connections": "11"})

    assert effective.config.capture == config.Capture(max_connections=11, max_pending=20, keep=True)
    assert {key: source for key, source in effective.sources.items() if source != "default"} == {
        "capture.max_connections": "flag:--max-connections",
        "capture.max_pending": f"file:{file}",
        "capture.keep": f"file:{file}",
    }


def test_a_list_given_by_flags_replaces_that_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'so_peercred.cgroups = ["all"]')

    effective = load(file, {"so_peercred.cgroups": ["a.service", "/sys/fs/cgroup/b"]})

    assert effective.config.so_peercred.cgroups == ["a.service", "/sys/fs/cgroup/b"]
    assert effective.sources["so_peercred.cgroups"] == "flag:--so-peercred"


def test_a_flag_can_take_back_what_the_file_switches_on(tmp_path: Path) -> None:
    file = write(tmp_path, "capture.keep = true")

    assert load(file, {"capture.keep": False}).config.capture.keep is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'capture.max_connections = "many"',
            "capture.max_connections: 'many' is not a whole number from 1 to 16777216",
        ),
        (
            "capture.max_connections = 0",
            "capture.max_connections: 0 is not a whole number from 1 to 16777216",
        ),
        (
            "capture.max_pending = 16777217",
            "capture.max_pending: 16777217 is not a whole number from 1 to 16777216",
        ),
        (
            "sweep.interval_seconds = 1.5",
            "sweep.interval_seconds: 1.5 is not a whole number from 1 to 86400",
        ),
        (
            "sweep.interval_seconds = true",
            "sweep.interval_seconds: true is not a whole number from 1 to 86400",
        ),
        ('capture.keep = "yes"', "capture.keep: 'yes' is not true or false"),
        ("capture.keep = 1", "capture.keep: 1 is not true or false"),
        ('capture.pin_dir = "pins"', "capture.pin_dir: 'pins' is not an absolute path in UTF-8"),
        ('api.socket = ""', "api.socket: '' is not an absolute path in UTF-8"),
        ('api.socket = "/run/a\\nb"', "api.socket: '/run/a\\nb' is not an absolute path in UTF-8"),
        (
            'capture.cgroup = "user.slice"',
            "capture.cgroup: 'user.slice' is not an absolute path in UTF-8, or \"root\"",
        ),
        ('capture.hooks = "kprobe"', "capture.hooks: 'kprobe' is not auto, trace or cgroup"),
        ('api.group = "a b"', "api.group: 'a b' is not the name of a group"),
        ('log.level = "loud"', "log.level: 'loud' is not debug, info, warning or error"),
        (
            'so_peercred.cgroups = "all"',
            "so_peercred.cgroups: 'all' is not a list of targets, each \"all\", the absolute path",
        ),
        (
            'so_peercred.cgroups = ["all", "postgresql"]',
            "so_peercred.cgroups: ['all', 'postgresql'] is not a list of targets, each",
        ),
        ("so_peercred.cgroups = [1]", "so_peercred.cgroups: [1] is not a list of targets, each"),
        ("log.level = 2026-11-23", "log.level: datetime.date(2026, 11, 23) is not debug, info,"),
        *(
            (f'metrics.address = "{address}"', f"metrics.address: '{address}' is not an address")
            for address in (
                "127.0.0.1",
                "127.0.0.1:65536",
                "127.0.0.1:0",
                "127.0.0.256:1",
                "::1:1",
                "host:1",
            )
        ),
        ("log = 1", "log: has to be a table, written [log]"),
        ("[[log]]", "log: has to be a table, written [log]"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_is_allowed(
    tmp_path: Path, text: str, said: str
) -> None:
    assert refusal(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "capture.max_conections = 1",
            "'capture.max_conections': unknown option; did you mean capture.max_connections?",
        ),
        ("[captur]", "'captur': unknown table; did you mean capture?"),
        ('socket = "/x"', "'socket': unknown option; did you mean api.socket?"),
        ("keep = true", "'keep': unknown option; did you mean capture.keep?"),
        ('api.pin_dir = "/x"', "'api.pin_dir': unknown option; did you mean capture.pin_dir?"),
        ("api.qqqq = 1", "'api.qqqq': unknown option; [api] has socket, group"),
        (
            "qqqq = 1",
            "'qqqq': unknown option; there are the tables capture, api, access, so_peercred, ",
        ),
        ('"a\\nb" = 1', "'a\\nb': unknown option; there are"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(
    tmp_path: Path, text: str, said: str
) -> None:
    assert refusal(tmp_path, text).startswith(said)


def test_invalid_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    assert re.match(r"not valid TOML: .*line 2", refusal(tmp_path, "[log]\nlevel\n"))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    assert "line 2" in refusal(tmp_path, "log.level = 'info'\nlog.level = 'debug'\n")


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, b'api.group = "\xff"').startswith("not UTF-8 at byte 13")


def test_a_long_value_is_not_repeated_whole(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, f'log.level = "{"x" * 100_000}"')) < 300


@pytest.mark.parametrize("address", ["0.0.0.0:1", "255.10.199.9:65535", "[::1]:59999", ""])
def test_metrics_may_be_served_at_every_address_and_port(address: str) -> None:
    assert load(None, {"metrics.address": address}).config.metrics.address == address


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^/dev/zero: longer than a megabyte"):
        load(Path("/dev/zero"), {})


def test_a_named_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.toml", {})


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, {})


@pytest.mark.parametrize("value", ["many", "0", "", "0x10", "٣٠٠٠٠٠٠٠٠"])
def test_a_wrong_flag_is_refused_by_its_name(value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(None, {"capture.max_pending": value})

    assert str(refused.value) == (
        f"--max-pending: {value!r} is not a whole number from 1 to 16777216"
    )


def test_a_path_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--socket: '/run/\\udcff' is not an absolute path"):
        load(None, {"api.socket": "/run/\udcff"})


def test_flags_are_distinct() -> None:
    assert len({option.flag for option in OPTIONS.values()}) == len(OPTIONS)


def test_the_example_file_lists_every_option_with_its_default() -> None:
    text = EXAMPLE.read_text()

    assert tomllib.loads(text) == {table: {} for table in TABLES}
    switched_on = tomllib.loads(re.sub(r"^#(?=[a-z])", "", text, flags=re.MULTILINE))
    listed = {
        f"{table}.{name}": value
        for table, options in switched_on.items()
        for name, value in options.items()
    }
    assert listed == {key: option.default for key, option in OPTIONS.items()}
    assert list(listed) == list(OPTIONS)


def test_every_option_of_the_example_file_has_a_comment_above_it_and_its_range() -> None:
    paragraphs = EXAMPLE.read_text().split("\n\n")
    for option in OPTIONS.values():
        (paragraph,) = (p for p in paragraphs if re.search(rf"^#{option.name} = ", p, re.MULTILINE))
        comment = " ".join(line.removeprefix("# ") for line in paragraph.splitlines()[:-1])
        assert comment
        if limits := re.search(r"from (\d+) to (\d+)", option.allowed):
            assert f"{limits[1]} to {limits[2]}" in comment

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from peercred.cli.main import cli as peercred
from peercredd.cli import main as peercredd
from peercredd.config import OPTIONS, TABLES, load

MAN = Path(__file__).parents[2] / "packaging" / "man"
PAGES = ("peercred.1", "peercredd.8", "peercredd.toml.5")
PROGRAMS = {"peercred.1": peercred, "peercredd.8": peercredd}

ESCAPES = {r"\-": "-", r"\(dq": '"', r"\(aq": "'"}
FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


def text(page: str) -> str:
    """The source, its characters as a reader sees them."""
    source = (MAN / page).read_text(encoding="ascii")
    for escape, character in ESCAPES.items():
        source = source.replace(escape, character)
    return source


def parts(of: str, macro: str) -> dict[str, str]:
    """What stands below each heading that `macro` makes, by heading."""
    _, *rest = re.split(rf"^\.{macro} (.+)\n", of, flags=re.MULTILINE)
    return dict(zip(rest[::2], rest[1::2], strict=True))


def sections(page: str) -> dict[str, str]:
    return parts(text(page), "SH")


def items(of: str) -> dict[str, str]:
    """What stands below the tag of each .TP, by tag without its macro."""
    return parts(re.sub(r"^\.TP\n\.[A-Z]+ ", ".TP ", of, flags=re.MULTILINE), "TP")


def described(of: str) -> set[str]:
    return set(FLAG.findall(" ".join(items(of))))


def flags(command: click.Command) -> set[str]:
    context = click.Context(command, help_option_names=["-h", "--help"])
    return {
        name
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


def own_flags(program: click.Group) -> dict[str, set[str]]:
    """By command: what it takes besides what the program takes before it."""
    return {name: flags(command) - flags(program) for name, command in commands(program)}


def commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    """All commands, one in a group by both names."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in commands(command))
        else:
            yield name, command


@pytest.mark.parametrize(("page", "program"), PROGRAMS.items())
def test_every_option_of_the_program_is_described_and_no_other(
    page: str, program: click.Group
) -> None:
    assert described(sections(page)["OPTIONS"]) == flags(program)


@pytest.mark.parametrize(("page", "program"), PROGRAMS.items())
def test_every_command_is_described_with_its_own_options_and_no_other(
    page: str, program: click.Group
) -> None:
    sections_of = parts(sections(page)["COMMANDS"], "SS")

    assert {name: described(of) for name, of in sections_of.items()} == own_flags(program)


@pytest.mark.parametrize(("page", "program"), PROGRAMS.items())
def test_the_synopsis_has_every_command_with_its_own_options_and_no_other(
    page: str, program: click.Group
) -> None:
    synopsis: dict[str, set[str]] = {}
    for line in sections(page)["SYNOPSIS"].split(".SY ")[1:]:
        command = re.search(r"^\.B ([a-z][a-z -]+)$", line, flags=re.MULTILINE)
        if command:
            synopsis.setdefault(command[1], set()).update(FLAG.findall(line))

    assert synopsis == own_flags(program)


@pytest.mark.parametrize("page", PAGES)
def test_no_option_is_mentioned_that_does_not_exist(page: str) -> None:
    program = PROGRAMS.get(page, peercredd)
    tables = "|".join(TABLES)

    mentioned = set(FLAG.findall(text(page)))
    keys = set(re.findall(rf"(?<![/.\w])(?:{tables})\.\w+", text(page)))

    assert mentioned <= flags(program).union(*own_flags(program).values())
    assert keys <= OPTIONS.keys()


def test_every_option_of_the_configuration_is_described_and_no_other() -> None:
    tables = parts(sections("peercredd.toml.5")["OPTIONS"], "SS")

    keys = [f"{table.strip('[]')}.{name}" for table, of in tables.items() for name in items(of)]

    assert keys == list(OPTIONS)


@pytest.mark.parametrize("key", OPTIONS)
def test_what_an_option_may_be_and_its_default_are_those_in_force(key: str) -> None:
    option = OPTIONS[key]
    tables = parts(sections("peercredd.toml.5")["OPTIONS"], "SS")

    *_, allowed, _, default = items(tables[f"[{option.table}]"])[option.name].splitlines()

    assert allowed == f"Allowed: {option.allowed}."
    assert default == f"Default: {json.dumps(option.default)}."


@pytest.mark.parametrize("key", OPTIONS)
def test_a_flag_names_the_option_that_it_sets(key: str) -> None:
    (of,) = [
        of
        for tag, of in items(sections("peercredd.8")["OPTIONS"]).items()
        if OPTIONS[key].flag in FLAG.findall(tag)
    ]

    assert f"( {key} )" in of


def test_the_examples_of_a_configuration_are_accepted(tmp_path: Path) -> None:
    examples = re.findall(
        r"^\.EX\n(.+?)^\.EE$", text("peercredd.toml.5"), flags=re.MULTILINE | re.DOTALL
    )
    file = tmp_path / "peercredd.toml"
    file.write_text("\n".join(examples))

    config = load(file, {}).config
    assert config.capture.keep
    assert config.so_peercred.cgroups == ["postgresql.service", "user.slice"]


@pytest.mark.parametrize("page", PAGES)
def test_it_renders_without_a_warning(page: str) -> None:
    groff = shutil.which("groff")
    if not groff:
        pytest.skip("groff is not installed; the package groff-base has it")

    done = subprocess.run(
        [groff, "-man", "-Tutf8", "-ww", "-z", MAN / page],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    assert (done.stdout, done.returncode) == ("", 0)

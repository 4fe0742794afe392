import configparser
import re
import tomllib
from itertools import pairwise
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PACKAGING = PROJECT / "packaging"


def test_the_debian_package_has_the_projects_version() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    newest = (PACKAGING / "debian" / "changelog").read_text().splitlines()[0]

    assert newest.startswith(f"peercredd ({project['version']}) ")


def test_the_unit_leaves_the_capture_in_the_kernel_and_the_removal_of_the_package_ends_it() -> None:
    unit = configparser.ConfigParser(strict=True)
    unit.read(PACKAGING / "peercredd.service")
    prerm = (PACKAGING / "debian" / "peercredd.prerm").read_text()

    assert unit["Service"]["ExecStart"] == "/usr/bin/peercredd --keep"
    # What is put in the place of #DEBHELPER# stops the service.
    assert re.search(r"#DEBHELPER#.*\bpeercredd unload\b", prerm, re.DOTALL)


def test_each_part_of_the_units_sandbox_that_is_off_has_its_reason_below() -> None:
    lines = (PACKAGING / "peercredd.service").read_text().splitlines()
    below = {
        line: after
        for line, after in pairwise(lines)
        if re.fullmatch(r"\w+=(no|all|default|)", line)
    }

    assert "PrivateUsers=no" in below
    assert [line for line, after in below.items() if not after.startswith("# ^ ")] == []

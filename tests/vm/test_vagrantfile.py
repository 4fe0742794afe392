import configparser
import re
import subprocess
from pathlib import Path

from vagrant import __main__ as lab
from vagrant.kernels import KERNELS

PROJECT = Path(__file__).resolve().parents[2]
VAGRANTFILE = (PROJECT / "vagrant/Vagrantfile").read_text()
CODE = "\n".join(line for line in VAGRANTFILE.splitlines() if not line.startswith("#"))
PROVISION = (PROJECT / "vagrant/provision.sh").read_text()


def test_vagrant_has_a_machine_for_each_kernel_of_the_list_and_names_only_the_default() -> None:
    assert '"kernels.json"' in CODE
    assert set(re.findall(r'"(debian\d\S*|sid)"', CODE)) == {"debian12"}
    assert KERNELS["debian12"].status == "supported"


def test_vagrant_calls_commands_that_dev_has() -> None:
    called = set(re.findall(r'\bdev\("([\w-]+)"', CODE))

    assert called == {"vm-box", "vm-accelerator"}
    assert called <= lab.main.commands.keys()
    assert called <= set(re.findall(r"[\w-]+", (PROJECT / "dev").read_text()))


def test_a_machine_of_vagrants_runs_the_unit_that_is_packaged() -> None:
    extract = re.search(r"^sed .* packaging/peercredd\.service\b", PROVISION, re.MULTILINE)
    assert extract

    unit = subprocess.run(
        ["bash", "-c", extract[0]], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout

    parsed = configparser.ConfigParser(strict=True)
    parsed.read_string(unit)
    assert parsed.sections() == ["Unit", "Service", "Install"]
    program = Path(parsed["Service"]["ExecStart"].split()[0])
    assert f".venv/bin/{program.name}" in PROVISION
    assert f"{program.parent}/" in PROVISION


def test_every_setting_that_reaches_a_machine_is_in_the_header() -> None:
    header = VAGRANTFILE.partition("\n\n")[0]
    passed_on = re.search(r"ENV\.slice\((.*)\)", CODE)
    assert passed_on

    for name in [*re.findall(r"\w+", passed_on[1]), *re.findall(r'ENV\["(\w+)"\]', CODE)]:
        assert name in header

"""How the package index of this machine is named to a guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from vagrant import index


def test_pip_and_uv_are_told_the_same_and_no_file_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"https://other.example/simple file://{tmp_path}")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "bundle.pem"))

    environment, bundle = index.settings()

    assert bundle == tmp_path / "bundle.pem"
    assert environment["PIP_INDEX_URL"] == "https://index.example/simple"
    assert environment["UV_DEFAULT_INDEX"] == "https://index.example/simple"
    assert environment["UV_INDEX"] == "https://other.example/simple"
    assert not any(str(tmp_path) in value for value in environment.values())


def test_a_proxy_on_loopback_is_where_a_guest_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")

    environment, _ = index.settings()

    assert environment["https_proxy"] == f"http://{index.HOST_OF_GUEST}:3128"

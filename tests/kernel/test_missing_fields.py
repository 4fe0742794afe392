"""A kernel that lacks an optional field serves the rest; one that lacks more says what."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harness.cgroup import Cgroup, mount_point
from peercredd import capture
from peercredd.btf import KernelTypes, MemberMissing

pytestmark = pytest.mark.kernel


def load(hook_set: str, cgroup: Path | None = None) -> capture.Capture:
    """Have the kernel verify it, and let it go: of so many the descriptors would run out."""
    loaded = capture.load(hook_set, max_connections=16, max_pending=16, cgroup=cgroup)
    for descriptor in (*loaded.programs.values(), *loaded.maps.values()):
        os.close(descriptor)
    if loaded.so_peercred is not None:
        os.close(loaded.so_peercred)
    return loaded


@pytest.mark.parametrize("field", capture.OPTIONAL)
def test_without_an_optional_member_the_rest_is_still_captured(
    field: str, hook_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    *others, last = capture.OPTIONAL[field].items()
    absent = {**dict(others), last[0]: f"{last[1]}_that_no_kernel_has"}
    monkeypatch.setitem(capture.OPTIONAL, field, absent)

    loaded = load(hook_set)
    assert loaded.missing_fields == (field,)


@pytest.mark.parametrize("macro", capture.USER_NAMESPACES)
def test_without_what_tells_who_made_a_user_namespace_all_is_still_captured(
    macro: str, hook_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(capture.USER_NAMESPACES, macro, "user_namespace.that_no_kernel_has")

    loaded = load(hook_set)
    assert loaded.missing_fields == ()


def test_without_the_kernels_own_context_so_peercred_is_there_all_the_same(
    hook_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(self: KernelTypes, name: str, find: Any = KernelTypes.function) -> Any:
        return find(self, f"{name}_that_no_kernel_has" if name == "bpf_cast_to_kern_ctx" else name)

    monkeypatch.setattr(KernelTypes, "function", without)
    assert not any("CAST" in flag for flag in capture.source(hook_set).flags)
    assert load(hook_set).so_peercred


@pytest.mark.parametrize("member", ["tcp_sock.write_seq", "tcp_sock.fastopen_connect"])
def test_without_a_required_member_the_error_names_it(
    member: str, hook_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(self: KernelTypes, path: str, find: Any = KernelTypes.member) -> Any:
        return find(self, f"{path}_that_no_kernel_has" if path == member else path)

    monkeypatch.setattr(KernelTypes, "member", without)
    with pytest.raises(MemberMissing, match=member):
        load(hook_set)


@pytest.mark.hook_sets("trace")
@pytest.mark.parametrize("member", capture.REQUIRED_BY_BOUNDS.values())
def test_without_what_tells_cgroups_apart_only_a_capture_of_one_cgroup_fails(
    member: str, hook_set: str, cgroup: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    (macro,) = (name for name, path in capture.REQUIRED_BY_BOUNDS.items() if path == member)
    monkeypatch.setitem(capture.REQUIRED_BY_BOUNDS, macro, f"{member}_that_no_kernel_has")

    load(hook_set, mount_point())
    with pytest.raises(MemberMissing, match=member):
        load(hook_set, cgroup.path)

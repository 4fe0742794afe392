"""A kernel that lacks an optional field serves the rest; one that lacks more says what."""

from __future__ import annotations

from typing import Any

import pytest

from peercredd import capture
from peercredd.btf import KernelTypes, MemberMissing
from peercredd.libbpf import KernelError

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("field", capture.OPTIONAL)
def test_without_an_optional_member_the_rest_is_still_captured(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    *others, last = capture.OPTIONAL[field].items()
    absent = {**dict(others), last[0]: f"{last[1]}_that_no_kernel_has"}
    monkeypatch.setitem(capture.OPTIONAL, field, absent)

    assert capture.load(max_connections=16, max_pending=16).missing_fields == (field,)


@pytest.mark.parametrize("member", ["tcp_sock.write_seq", "tcp_sock.fastopen_connect"])
def test_without_a_required_member_the_error_names_it(
    member: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(self: KernelTypes, path: str, find: Any = KernelTypes.member) -> Any:
        return find(self, f"{path}_that_no_kernel_has" if path == member else path)

    monkeypatch.setattr(KernelTypes, "member", without)
    with pytest.raises(MemberMissing, match=member):
        capture.load(max_connections=16, max_pending=16)


def test_what_the_compiler_or_the_verifier_objects_to_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = capture.source_text

    def broken(*arguments: Any) -> str:
        return source(*arguments).replace("if (!socket)\n        return 1;", "")

    monkeypatch.setattr(capture, "source_text", broken)
    with pytest.raises(KernelError) as caught:
        capture.load(max_connections=16, max_pending=16)
    assert "the kernel refuses cgroup_sock_ops: R1 type=sock_or_null" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1

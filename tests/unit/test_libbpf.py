from __future__ import annotations

import ctypes
import errno

import pytest

from peercredd import libbpf


class Library:
    """One whose functions are busy so many times."""

    def __init__(self, times: int) -> None:
        self._left = times

    def bpf_raw_tracepoint_open(self, _name: None, _program: int) -> int:
        self._left -= 1
        ctypes.set_errno(errno.EBUSY if self._left >= 0 else 0)
        return -errno.EBUSY if self._left >= 0 else 7


def test_a_function_that_is_busy_for_a_moment_is_attached_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(libbpf, "library", lambda: Library(0))
    assert libbpf.attach_to_function(3, "tcp_close") == 7
    library = Library(2)
    monkeypatch.setattr(libbpf, "library", lambda: library)
    assert libbpf.attach_to_function(3, "tcp_close") == 7


def test_one_that_stays_busy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(10_000)
    monkeypatch.setattr(libbpf, "library", lambda: library)
    with pytest.raises(libbpf.KernelError, match=r"attach to tcp_close\(\): Device or resource"):
        libbpf.attach_to_function(3, "tcp_close")

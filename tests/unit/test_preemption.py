"""What the kernel says of its preemption model is read right; what it does not say is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from peercredd import preemption


@pytest.mark.parametrize(
    ("said", "model"),
    [
        ("none (voluntary) full \n", "voluntary"),
        ("none voluntary (full) \n", "full"),
        ("full (lazy) \n", "lazy"),
        ("(none) voluntary full \n", "none"),
    ],
)
def test_a_kernel_that_can_change_its_model_is_asked(tmp_path: Path, said: str, model: str) -> None:
    (tmp_path / "preempt").write_text(said)
    assert preemption.model("#1 SMP PREEMPT_DYNAMIC", tmp_path / "preempt") == model


@pytest.mark.parametrize(
    ("version", "model"),
    [
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)", "unknown"),
        ("#1 SMP PREEMPT_RT Debian 6.1.192-2 (2026-11-16)", "rt"),
        ("#1 SMP PREEMPT Tue Nov 3", "full"),
        ("#1 SMP PREEMPT_LAZY Tue Nov 3", "lazy"),
        ("#1 SMP Tue Nov 3", "voluntary"),
    ],
)
def test_of_others_the_version_tells(tmp_path: Path, version: str, model: str) -> None:
    assert preemption.model(version, tmp_path / "not there") == model


@pytest.mark.parametrize("model", ["none", "voluntary"])
def test_nothing_speaks_against_tracing_a_kernel_that_lets_its_own_code_finish(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(preemption, "model", lambda: model)
    assert preemption.why_not_to_trace() is None


@pytest.mark.parametrize("model", ["full", "lazy", "rt", "unknown"])
def test_tracing_is_advised_against_where_calls_are_missed_or_may_be(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(preemption, "model", lambda: model)
    reason = preemption.why_not_to_trace()
    assert reason
    assert len(reason.splitlines()) == 1

"""What Prometheus gets, and what whoever can connect there can not do."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.memory_view import MemoryView, connection
from harness.patience import patient
from peercredd import metrics
from peercredd.figures import BOUNDS_SECONDS, FOUND, Durations, Figures
from peercredd.listen import ListenError
from peercredd.store import Totals

DASHBOARD = Path(__file__).parents[2] / "packaging" / "grafana" / "peercredd.json"
Labels = tuple[tuple[str, str], ...]


@pytest.fixture
def view() -> MemoryView:
    return MemoryView(connection(10))


@pytest.fixture
def figures() -> Figures:
    return Figures()


@pytest.fixture
def port(view: MemoryView, figures: Figures) -> Iterator[int]:
    with metrics.serving("127.0.0.1", 0, metrics.Measured(view, figures)) as port:
        yield port


def scraped(port: int, host: str = "127.0.0.1") -> dict[str, dict[Labels, float]]:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    values: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            values.setdefault(sample.name, {})[labels] = sample.value
    return values


def test_the_capture_is_told_as_the_status_has_it(view: MemoryView, port: int) -> None:
    view.attached["sock_ops"] = False
    view.counts = {"connect4": (12, 3)}

    values = scraped(port)

    assert values["peercredd_table_entries"] == {(("table", "connections"),): 1}
    assert values["peercredd_table_max_entries"] == {(("table", "connections"),): 131072}
    assert values["peercredd_drops_total"] == {
        (("reason", "PENDING_FULL"),): 0,
        (("reason", "OTHER_SYN"),): 3,
    }
    assert values["peercredd_program_attached"] == {
        (("program", "connect4"),): 1,
        (("program", "sock_ops"),): 0,
    }
    assert values["peercredd_program_runs_total"] == {(("program", "connect4"),): 12}
    assert values["peercredd_program_missed_total"] == {(("program", "connect4"),): 3}
    assert values["peercredd_connections_established_total"] == {(): 7}
    assert values["peercredd_connections_retired_total"] == {(): 6}
    (((hook_set, *_), one),) = values["peercredd_build_info"].items()
    assert (hook_set, one) == (("hook_set", "cgroup"), 1)


def test_a_figure_that_the_kernel_does_not_give_is_absent_and_not_0(port: int) -> None:
    values = scraped(port)

    assert "peercredd_program_runs_total" not in values
    assert "peercredd_program_missed_total" not in values


def test_the_daemons_own_work_is_counted_by_outcome_and_as_a_histogram(
    figures: Figures, port: int
) -> None:
    figures.lookups.update([FOUND, FOUND, "NEVER_SEEN"])
    figures.calls["Lookup"] = Durations()
    for seconds in (0.000_15, 0.001, 7.0):
        figures.calls["Lookup"].add(seconds)

    values = scraped(port)

    assert values["peercredd_lookups_total"] == {
        (("outcome", "FOUND"),): 2,
        (("outcome", "NEVER_SEEN"),): 1,
    }
    buckets = values["peercredd_call_duration_seconds_bucket"]
    at_most = {dict(labels)["le"]: count for labels, count in buckets.items()}
    assert at_most == {
        str(bound): (bound >= 0.0002) + (bound >= 0.001) for bound in BOUNDS_SECONDS
    } | {"+Inf": 3}
    assert values["peercredd_call_duration_seconds_sum"] == {
        (("method", "Lookup"),): pytest.approx(7.00115)
    }


def test_it_serves_at_an_ipv6_address_too(view: MemoryView, figures: Figures) -> None:
    with metrics.serving("::1", 0, metrics.Measured(view, figures)) as port:
        assert scraped(port, "[::1]")["peercredd_build_info"]


def test_who_comes_beyond_the_limit_is_hung_up_on_and_the_next_one_served(port: int) -> None:
    with ExitStack() as idle:
        for _ in range(metrics.MAX_SCRAPES):
            connected = socket.create_connection(("127.0.0.1", port))
            idle.enter_context(connected)
            # So that it has its thread before the next one comes.
            connected.sendall(b"GET /metrics HTTP/1.1\r\n")
        with socket.create_connection(("127.0.0.1", port)) as late:
            late.settimeout(60)
            assert late.recv(1) == b""
    # Who hung up is done with in no particular moment.
    while True:
        with suppress(OSError):
            assert scraped(port)["peercredd_build_info"]
            return


def test_who_sends_a_request_bit_by_bit_is_hung_up_on(
    view: MemoryView, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SCRAPE_SECONDS", 0.2)
    with (
        metrics.serving("127.0.0.1", 0, metrics.Measured(view, figures)) as port,
        socket.create_connection(("127.0.0.1", port)) as slow,
    ):
        slow.settimeout(0.01)
        slow.sendall(b"GET /")
        deadline = time.monotonic() + patient(30)
        while True:
            assert time.monotonic() < deadline, "it may take for ever"
            try:
                slow.sendall(b"x")
                if slow.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return


class Clock:
    """A clock that goes while something is done, and counts for how long one slept."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_who_scrapes_without_end_leaves_most_of_the_time_to_callers(
    figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)

    class Large(MemoryView):
        def totals(self) -> Totals:
            clock.now += 2.0
            return super().totals()

    measured = metrics.Measured(Large(connection(10)), figures)
    for _ in range(3):
        assert list(measured.collect())
        clock.now += 1.0

    assert clock.slept == [0, 2.0 * metrics.REST - 1.0, 2.0 * metrics.REST - 1.0]


@pytest.mark.parametrize("garbage", [b"\xff\x00\r\n\r\n", b"GET " + b"/" * 70_000 + b"\r\n\r\n"])
def test_garbage_is_answered_or_hung_up_on_and_nothing_is_logged(
    port: int, garbage: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(60)
        stranger.sendall(garbage)
        try:
            while stranger.recv(65536):
                pass
        except ConnectionResetError:
            pass

    assert scraped(port)["peercredd_build_info"]
    assert capfd.readouterr() == ("", "")


def test_an_address_that_is_taken_is_one_line_that_names_the_option(
    view: MemoryView, figures: Figures, port: int
) -> None:
    with (
        pytest.raises(
            ListenError, match=rf"^metrics\.address: .*127\.0\.0\.1 port {port}: .*in use"
        ),
        metrics.serving("127.0.0.1", port, metrics.Measured(view, figures)),
    ):
        pass


def test_the_dashboard_asks_for_nothing_that_is_not_served(
    view: MemoryView, figures: Figures, port: int
) -> None:
    view.counts = {"connect4": (12, 3)}
    figures.lookups[FOUND] += 1
    with figures.timing("Lookup"):
        pass
    dashboard = json.loads(DASHBOARD.read_text())

    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for text in expressions for name in re.findall(r"peercredd_\w+", text)}

    assert len(expressions) >= len(dashboard["panels"])
    assert asked <= scraped(port).keys()

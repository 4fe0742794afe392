import io
import os
import socket

import pytest
from rich.console import Console

from bench.rivals import Answer, inet_diag, lsof_answer, proc_net_tcp_row, ss_answer
from bench.table import Row, Section, Target, Unit, Verdict, as_json, render
from bench.timing import percentile
from bench.trend import trend

SERVER = ("127.0.0.1", 38587)
CLIENT = ("127.0.0.1", 59370)

PROC_NET_TCP = (
    b"  54: 0100007F:96BB 0100007F:E7EA 01 00000000:00000000 00:00000000 00000000     0"
    b"        0 4606500 1 00000000630664fc 20 0 0 10 -1                   \n"
    b"  42: 0100007F:E7EA 0100007F:96BB 01 00000000:00000000 00:00000000 00000000 20003"
    b"        0 4051313 2 00000000d8ca9580 20 0 0 10 -1                   \n"
)
SS_LIVE = (
    "ESTAB 0      0      127.0.0.1:59370 127.0.0.1:38587 "
    'users:(("python",pid=20848,fd=4)) uid:20003 ino:4051313 sk:1d1ce2 cgroup:/ <->\n'
)
SS_ROOT = (
    "ESTAB 0      0      127.0.0.1:59370 127.0.0.1:38587 "
    'users:(("python",pid=20848,fd=4)) ino:4051313 sk:1d1ce2 cgroup:/ <->\n'
)
SS_GONE = (
    "FIN-WAIT-2 0      0      127.0.0.1:59370 127.0.0.1:38587 "
    "timer:(timewait,59sec,0) ino:0 sk:1d1ce2\n"
)
LSOF = (
    "p20847\nu0\nn127.0.0.1:38587->127.0.0.1:59370\n"
    "p20848\nu20003\nn127.0.0.1:59370->127.0.0.1:38587\n"
)


def test_proc_net_tcp_gives_the_uid_and_inode_of_the_clients_row_not_the_servers() -> None:
    assert proc_net_tcp_row(PROC_NET_TCP, SERVER, CLIENT) == (20003, 4051313)


def test_proc_net_tcp_without_the_row_gives_nothing() -> None:
    assert proc_net_tcp_row(PROC_NET_TCP, SERVER, ("127.0.0.1", 59371)) is None


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (SS_LIVE, Answer(20003, 20848)),
        (SS_ROOT, Answer(0, 20848)),
        (SS_GONE, None),
        ("", None),
    ],
)
def test_ss_is_read_as_its_users_read_it(output: str, answer: Answer | None) -> None:
    assert ss_answer(output) == answer


def test_lsof_gives_the_holder_of_the_clients_end() -> None:
    assert lsof_answer(LSOF, SERVER, CLIENT) == Answer(20003, 20848)
    assert lsof_answer(LSOF, SERVER, ("127.0.0.1", 59371)) is None


def test_inet_diag_names_the_owner_of_a_live_client() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        server, remote = listener.getsockname(), client.getsockname()
        assert inet_diag(server, remote) == Answer(os.getuid(), None)
        assert inet_diag(remote, ("127.0.0.2", remote[1])) is None


def test_a_verdict_holds_its_figure_to_the_target() -> None:
    assert Verdict(1.2, target=Target(1.2)).passed
    assert Verdict(1.21, target=Target(1.2)).passed is False
    assert Verdict(0.85, target=Target(0.85, at_least=True)).passed
    assert Verdict(0.84, target=Target(0.85, at_least=True)).passed is False
    assert Verdict(1.0).passed is None


def test_the_table_and_the_json_show_the_same_figures_and_verdicts() -> None:
    row = Row("Lookup", (0.00018, None), Unit.SECONDS, Verdict(1.5, target=Target(1.2)))
    sections = [Section("Time", ("10 sockets", "1,000 sockets"), (row,))]
    output = io.StringIO()
    Console(file=output, width=120).print(render(sections, "on a machine"))
    for text in ("180 µs", " - ", "x1.500", "≤ x1.200 MISS"):
        assert text in output.getvalue()
    assert as_json(sections)[0]["rows"][0] == {
        "name": "Lookup",
        "values": (0.00018, None),
        "unit": "s",
        "verdict": {
            "figure": 1.5,
            "unit": "ratio",
            "target": {"limit": 1.2, "at_least": False},
            "passed": False,
        },
    }


def test_a_percentile_is_a_time_that_was_seen() -> None:
    times = [each / 100 for each in range(100, 0, -1)]
    assert percentile(99, times) == 0.99
    assert percentile(50, times) == 0.5
    assert percentile(100, times) == 1.0
    assert percentile(99, [3.0]) == 3.0
    assert percentile(99, [1.0, 3.0]) == 3.0


def test_a_trend_is_the_slope_of_what_has_settled() -> None:
    hours = [each / 60 for each in range(31)]
    # Ten minutes of filling caches, then a byte a minute.
    figures = [min(minute, 10) * 1000 + minute for minute in range(31)]
    seen = trend(hours, figures)

    assert (seen.start, seen.end, seen.most) == (0, 10_030, 10_030)
    assert seen.per_hour == pytest.approx(60)


def test_a_trend_of_what_stays_the_same_is_flat() -> None:
    assert trend([1.0, 2.0, 3.0, 4.0], [7, 7, 7, 7]).per_hour == 0

from __future__ import annotations

import pytest

from peercredd.btf import Prototype
from peercredd.hooks import PROGRAMS, Traced, argument_macros
from peercredd.libbpf import KernelError

SOCK, STATE, ADDED = ("struct sock *", "sk"), ("int", "state"), ("unsigned int", "added")
SET_STATE = next(each for each in PROGRAMS["trace"] if each.name == "tcp_set_state")
ACCEPT = next(each for each in PROGRAMS["trace"] if each.name == "inet_csk_accept")


@pytest.mark.parametrize(
    ("parameters", "sk", "state"),
    [((SOCK, STATE), 0, 1), ((ADDED, SOCK, STATE), 1, 2), ((STATE, ADDED, SOCK), 2, 0)],
)
def test_an_argument_is_taken_where_this_kernel_has_it(
    parameters: tuple[tuple[str, str], ...], sk: int, state: int
) -> None:
    assert isinstance(SET_STATE, Traced)
    assert argument_macros(SET_STATE, Prototype(parameters, "void")) == [
        f"-DARGUMENT_tcp_set_state_sk={sk}",
        f"-DARGUMENT_tcp_set_state_state={state}",
    ]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_result_is_taken_behind_all_arguments(count: int) -> None:
    assert isinstance(ACCEPT, Traced)
    prototype = Prototype((SOCK, *[ADDED] * (count - 1)), "struct sock *")
    assert argument_macros(ACCEPT, prototype) == [f"-DRESULT_inet_csk_accept={count}"]


@pytest.mark.parametrize(
    ("traced", "prototype", "blamed"),
    [
        (SET_STATE, Prototype((SOCK,), "void"), "has no parameter 'int state'"),
        (SET_STATE, Prototype((SOCK, ("long", "state")), "void"), "has no parameter 'int state'"),
        (ACCEPT, Prototype((SOCK,), "int"), "gives 'int', not 'struct sock *'"),
    ],
)
def test_a_function_that_is_not_what_it_was_is_an_error_that_names_it(
    traced: Traced, prototype: Prototype, blamed: str
) -> None:
    with pytest.raises(KernelError) as raised:
        argument_macros(traced, prototype)
    assert traced.name in str(raised.value)
    assert blamed in str(raised.value)

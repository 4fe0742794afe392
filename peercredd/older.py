"""Connections that began before the capture did: a lookup can say that, and no more."""

from __future__ import annotations

import errno

from peercredd import namespaces, sockdiag
from peercredd.libbpf import KernelError, Map
from peercredd.records import TUPLE, hash_of_cookie, hash_of_tuple, older_key


def learn(older: Map) -> dict[str, int]:
    """Write down every TCP connection that there is, in every reachable network namespace.

    Which end of one called connect() is not known any more. Its tuple is kept as if
    the listed end had; a lookup asks for it both ways.

    Args:
        older: the BPF map ``older`` of bpf/maps.h.

    Returns:
        How many sockets were ``learnt`` and ``left_out`` because the map is full.

    Raises:
        OSError: a namespace may not be entered, or the kernel does not list its sockets.
    """
    learnt = left_out = 0
    for namespace in namespaces.reachable():
        with namespaces.entered(namespace) as netns_cookie:
            for each in sockdiag.sockets():
                if not left_out and _write(older, each, netns_cookie):
                    learnt += 1
                else:
                    left_out += 1
    return {"learnt": learnt, "left_out": left_out}


def _write(older: Map, each: sockdiag.Socket, netns_cookie: int) -> bool:
    """False if the map has no room."""
    addresses = TUPLE.pack(
        netns_cookie,
        each.local_address,
        each.remote_address,
        each.local_port,
        each.remote_port,
    )
    value = bytes(older.value_size)
    try:
        older.update(older_key(hash_of_cookie(each.cookie)), value)
        older.update(older_key(hash_of_tuple(addresses)), value)
    except KernelError as error:
        if error.errno != errno.E2BIG:
            raise
        return False
    return True

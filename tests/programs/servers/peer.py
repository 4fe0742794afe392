"""A TCP server for one client: prints its own port, then who that client is: pid, uid, gid."""

import socket
import struct

UCRED = struct.Struct("iII")

with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    accepted, _ = listener.accept()
    with accepted:
        peer = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        print(*UCRED.unpack(peer))

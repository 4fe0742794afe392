"""``python -m peercredd.server_process JSON PID``: the server, a child of the daemon.

JSON is `server_life.Settings`, PID the daemon's.
"""

from __future__ import annotations

import os
import sys

from peercredd import lean

if __name__ == "__main__":
    lean.keep_no_freed_blocks()
    lean.leave_out()

    # gRPC writes what strangers send to the socket into the log, as it comes.
    os.environ["GRPC_VERBOSITY"] = "NONE"

    from peercredd import server_life

    sys.exit(server_life.main(sys.argv[1], int(sys.argv[2])))

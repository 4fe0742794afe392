"""``python -m peercredd.process JSON``: the daemon with a checked configuration.

The command line becomes this by exec(2), so that what parsed it is not carried for
as long as the daemon runs: click, importlib.metadata and the like are 3 MB.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # structlog imports rich, and asyncio ssl, where they are installed, and nothing of
    # either is used. None says "not installed": 8 MB.
    sys.modules.update(dict.fromkeys(("rich", "ssl")))  # type: ignore[arg-type]

    # gRPC writes what strangers send to the socket into the log, as it comes.
    os.environ["GRPC_VERBOSITY"] = "NONE"

    import msgspec

    from peercredd import config, daemon

    sys.exit(daemon.run(msgspec.json.decode(sys.argv[1], type=config.Config)))

"""``python -m peercredd.process JSON``: the daemon with a checked configuration.

The command line becomes this by exec(2), so that what parsed it is not carried for
as long as the daemon runs: click, importlib.metadata and the like are 3 MB.
"""

from __future__ import annotations

import sys

from peercredd import lean

if __name__ == "__main__":
    lean.leave_out()

    import msgspec

    from peercredd import config, daemon

    sys.exit(daemon.run(msgspec.json.decode(sys.argv[1], type=config.Config)))

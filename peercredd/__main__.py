"""``python -m peercredd`` is ``peercredd``."""

from peercredd.cli import main

main(prog_name="peercredd")

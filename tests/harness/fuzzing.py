"""Inputs that nobody meant, by the thousand: hypothesis, a corpus of seeds, a budget of time.

A target takes bytes and raises when a promise is broken. Its seeds are the files in
tests/fuzz/corpus/TARGET. An input that breaks a promise is shrunk and saved there too, so that
it is tried first from then on.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).resolve().parents[1] / "fuzz" / "corpus"
SECONDS = float(os.environ.get("PEERCREDD_FUZZ_SECONDS", "0"))
"""For all targets; without it, each gets EXAMPLES inputs and no more."""
EXAMPLES = 200
LONGEST = 4096

Target = Callable[[bytes], None]


def fuzz(name: str, target: Target, inputs: st.SearchStrategy[bytes]) -> None:
    """Try the seeds, then `inputs` and damaged seeds, for as long as the budget says."""
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    for seed in seeds:
        target(seed)
    broke: bytes | None = None

    # What has failed is in the corpus, in a form that another version of hypothesis can read.
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs | damaged(seeds))
    def attempt(data: bytes) -> None:
        nonlocal broke
        try:
            target(data)
        except Exception:
            broke = data
            raise

    targets = sum(folder.is_dir() for folder in CORPUS.iterdir())
    ends = time.monotonic() + SECONDS / targets
    try:
        attempt()
        while time.monotonic() < ends:
            attempt()
    except BaseException:
        if broke is not None:
            digest = hashlib.sha256(broke).hexdigest()[:16]
            (CORPUS / name / f"broke-{digest}").write_bytes(broke)
        raise


def damaged(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """A seed with some of its bytes replaced, left out, doubled, or exchanged with another's."""
    edits = st.tuples(
        st.integers(0, LONGEST), st.integers(0, 64), st.binary(max_size=16) | st.sampled_from(seeds)
    )

    def damage(seed: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
        for place, length, new in changes:
            place %= len(seed) + 1
            seed = seed[:place] + new + seed[place + length :]
        return seed[: 4 * LONGEST]

    return st.builds(damage, st.sampled_from(seeds), st.lists(edits, min_size=1, max_size=8))

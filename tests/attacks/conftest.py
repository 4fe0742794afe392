from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.routes import USUAL
from harness.stage import Stage
from harness.steps import Route


@pytest.fixture(params=USUAL, ids=str)
def route(request: pytest.FixtureRequest) -> Route:
    """Both families, and one in the dress of the other."""
    route: Route = request.param
    return route


@pytest.fixture
def elsewhere(stage: Stage) -> Iterator[Stage]:
    """A scenario of actors whose sockets are made where nothing is captured."""
    with (
        Cgroup() as uncaptured,
        Origin(uncaptured) as origin,
        Stage(origin, stage.client, alone=False) as other,
    ):
        yield other

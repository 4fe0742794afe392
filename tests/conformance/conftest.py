from __future__ import annotations

import pytest

from harness.routes import USUAL
from harness.steps import Route


@pytest.fixture(params=USUAL, ids=str)
def route(request: pytest.FixtureRequest) -> Route:
    """Both families, and one in the dress of the other."""
    route: Route = request.param
    return route

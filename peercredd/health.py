"""grpc.health.v1: SERVING only while nothing is wrong, which is asked each time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection

from google.rpc import code_pb2
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2

from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.service import RequestError

WATCH_INTERVAL_SECONDS = 1.0

_PEER_CREDENTIALS = pb.DESCRIPTOR.services_by_name["PeerCredentials"].full_name
_SERVICES = ("", _PEER_CREDENTIALS)


class HealthService:
    """The answers of grpc.health.v1.Health; `problems` tells what is wrong now."""

    def __init__(self, problems: Callable[[], Collection[str]]) -> None:
        self._problems = problems

    def check(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        """Return the present state. Raises RequestError for an unknown service."""
        if request.service not in _SERVICES:
            raise RequestError(Status(code=code_pb2.NOT_FOUND, message="unknown service"))
        return self._state()

    def list(self, _: health_pb2.HealthListRequest) -> health_pb2.HealthListResponse:
        """Return the present state of all services."""
        state = self._state()
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(_SERVICES, state))

    async def watch(
        self, request: health_pb2.HealthCheckRequest
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Yield the present state, then each change; never ends."""
        sent = None
        while True:
            state = self._state() if request.service in _SERVICES else _UNKNOWN
            if state != sent:
                yield state
                sent = state
            await asyncio.sleep(WATCH_INTERVAL_SECONDS)

    def _state(self) -> health_pb2.HealthCheckResponse:
        return _NOT_SERVING if self._problems() else _SERVING


_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
_NOT_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
_UNKNOWN = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)

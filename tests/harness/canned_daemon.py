"""A gRPC server that gives the answers a test has put into it: the client's peer."""

# ruff: noqa: N802 - methods are named as in the proto

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1.peer_credentials_pb2_grpc import (
    PeerCredentialsServicer,
    add_PeerCredentialsServicer_to_server,
)


def failure(code: int, text: str, reason: str = "", **metadata: str) -> Status:
    """Return a status as the daemon sends it; without a reason, as a bare gRPC server does."""
    answer = Status(code=code, message=text)
    if reason:
        detail = AnyMessage()
        detail.Pack(ErrorInfo(domain="peercred.v1", reason=reason, metadata=metadata))
        answer.details.append(detail)
    return answer


def found(cookie: int = 0) -> pb.LookupResponse:
    """Return the least a daemon may answer, with `cookie` to know it by."""
    return pb.LookupResponse(
        peer_end=pb.END_CLIENT,
        basis=pb.BASIS_SOCKET,
        peer=pb.Credentials(pid=7, uid=0, gid=0),
        server_socket_cookie=cookie,
        namespaces=pb.Namespaces(pid_namespace=4026531836, user_namespace=4026531837),
    )


class CannedDaemon(PeerCredentialsServicer):
    """Serves on `address` while its ``with`` block runs."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.keys: list[pb.ConnectionKey] = []
        """Every key asked for, in any way."""
        self.namespaces: list[pb.Namespaces] = []
        """Those that each call named; none for the initial ones."""
        self.batch_sizes: list[int] = []
        self.filters: list[pb.ListConnectionsRequest] = []
        self.list_seconds_remaining = 0.0
        self.answers: dict[int, pb.LookupResponse | Status] = {}
        """By socket cookie; other keys get `answer`."""
        self.answer: pb.LookupResponse | Status = found()
        self.results: list[pb.LookupResult] | None = None
        """What every batch gets, in place of the answers to its keys."""
        self.pages: list[pb.ListConnectionsResponse | Status] = []
        self.watched: list[pb.WatchConnectionsResponse | Status] = []
        self.status: pb.GetStatusResponse | Status = pb.GetStatusResponse()
        self.access: pb.WhoAmIResponse | Status = pb.WhoAmIResponse(
            transport=pb.TRANSPORT_UNIX_SOCKET, scope=pb.SCOPE_ALL, reason="it may"
        )
        self.release = threading.Event()
        """What a call waits for before it answers."""
        self.release.set()
        self.waiting = threading.Event()
        """Set as soon as a call waits."""
        self._server = grpc.server(ThreadPoolExecutor(8))
        add_PeerCredentialsServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(address)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release.set()
        self._server.stop(None).wait()

    def Lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupResponse:
        self._wait()
        self.namespaces.append(request.namespaces)
        answer = self._answer(request.key)
        if isinstance(answer, Status):
            fail(context, answer)
        return answer

    def BatchLookup(self, request: pb.BatchLookupRequest, context: Any) -> pb.BatchLookupResponse:
        self.batch_sizes.append(len(request.keys))
        self.namespaces.append(request.namespaces)
        if self.results is not None:
            return pb.BatchLookupResponse(results=self.results)
        response = pb.BatchLookupResponse()
        for key in request.keys:
            answer = self._answer(key)
            if isinstance(answer, Status):
                response.results.add(error=answer)
            else:
                response.results.add(found=answer)
        return response

    def LookupStream(self, request_iterator: Any, context: Any) -> NoReturn:
        raise NotImplementedError

    def ListConnections(
        self, request: pb.ListConnectionsRequest, context: Any
    ) -> Iterator[pb.ListConnectionsResponse]:
        self.filters.append(request)
        self.list_seconds_remaining = context.time_remaining()
        for page in self.pages:
            if isinstance(page, Status):
                fail(context, page)
            yield page
        self._wait()

    def WatchConnections(
        self, request: pb.WatchConnectionsRequest, context: Any
    ) -> Iterator[pb.WatchConnectionsResponse]:
        for response in self.watched:
            if isinstance(response, Status):
                fail(context, response)
            yield response
        self._wait()

    def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        if isinstance(self.status, Status):
            fail(context, self.status)
        return self.status

    def WhoAmI(self, request: pb.WhoAmIRequest, context: Any) -> pb.WhoAmIResponse:
        if isinstance(self.access, Status):
            fail(context, self.access)
        return self.access

    def _answer(self, key: pb.ConnectionKey) -> pb.LookupResponse | Status:
        self.keys.append(key)
        return self.answers.get(key.socket_cookie, self.answer)

    def _wait(self) -> None:
        if not self.release.is_set():
            self.waiting.set()
            self.release.wait()


def fail(context: Any, answer: Status) -> NoReturn:
    context.abort_with_status(rpc_status.to_status(answer))
    raise AssertionError

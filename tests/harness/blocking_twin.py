"""AsyncClient behind the methods of Client: what is promised of one is tested on both."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from peercred import Access, AsyncClient, Connection, PeerCredentials, PeerCredError, Status


class BlockingTwin:
    """An AsyncClient and an event loop of its own."""

    def __init__(self, address: str | None = None, **named: Any) -> None:
        self._runner = asyncio.Runner()

        async def make() -> AsyncClient:
            return AsyncClient(address, **named)

        try:
            self._client = self._runner.run(make())
        except PeerCredError:
            self._runner.close()
            raise

    @property
    def address(self) -> str:
        return self._client.address

    def access(self) -> Access:
        return self._runner.run(self._client.access())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        self._runner.close()

    def close(self) -> None:
        self._runner.run(self._client.close())

    def lookup(self, sock: Any, **named: Any) -> PeerCredentials:
        return self._runner.run(self._client.lookup(sock, **named))

    def lookup_cookie(self, *arguments: Any, **named: Any) -> PeerCredentials:
        return self._runner.run(self._client.lookup_cookie(*arguments, **named))

    def lookup_tuple(self, *arguments: Any, **named: Any) -> PeerCredentials:
        return self._runner.run(self._client.lookup_tuple(*arguments, **named))

    def lookup_many(
        self, questions: Iterable[Any], **named: Any
    ) -> list[PeerCredentials | PeerCredError]:
        return self._runner.run(self._client.lookup_many(questions, **named))

    def connections(self, **filters: Any) -> Iterator[Connection]:
        return self._drain(self._client.connections(**filters))

    def status(self) -> Status:
        return self._runner.run(self._client.status())

    def _drain(self, connections: Any) -> Iterator[Connection]:
        async def step() -> Connection | None:
            return await anext(connections, None)

        while (connection := self._runner.run(step())) is not None:
            yield connection

"""The fastest server that proves a success: `server.py DELAY_S [tell]` prints its port, then serves until it is ended.

It reads no more of a request than its end and its idempotency key. With `tell` it prints, per request, when it was
complete (monotonic seconds) and that key.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time

BODY = b'{"id":"6f2c1f0e-3c60-4d8e-9d0c-2f1f2b3c4d5e","status":"completed"}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
KEY = re.compile(rb"\r\nidempotency-key: *([^\r]+)", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """One kept-alive connection, requests one after the other."""

    def __init__(self, delay_s: float, *, tells: bool) -> None:
        self._delay_s = delay_s
        self._tells = tells
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while True:
            head, blank, rest = self._data.partition(b"\r\n\r\n")
            length = LENGTH.search(head)
            size = int(length.group(1)) if length else 0
            if not blank or len(rest) < size:
                return
            self._data = rest[size:]
            self._receive(head)

    def _receive(self, head: bytes) -> None:
        assert self._transport is not None
        key = KEY.search(head)
        if self._tells and key:
            print(time.monotonic(), key.group(1).decode(), flush=True)
        if self._delay_s:
            asyncio.get_running_loop().call_later(self._delay_s, self._transport.write, ANSWER)
        else:
            self._transport.write(ANSWER)


async def serve(delay_s: float, *, tells: bool) -> None:
    """Listen on a free port of this machine."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(delay_s, tells=tells), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]), tells=sys.argv[2:] == ["tell"]))

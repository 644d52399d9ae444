"""How fast a backlog leaves, compared with the least that could send it."""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
from collections.abc import Iterator

import httpx
from measure import API_KEY, Bench, Result, in_turns, seconds, server

from versioner_agent import config, events, flush
from versioner_agent.delivery import ENDPOINTS, USER_AGENT
from versioner_agent.outbox import Outbox

CONCURRENCY = 8
PRODUCTS = 50


def drain(bench: Bench) -> Iterator[Result]:
    """Measure with a server that answers at once: what our own work costs."""
    ours, floor = _compared(bench.directory, backlog=2000, delay_s=0.0, pairs=5)
    yield Result("drain", ours, "ev/s", 0.7, floor, at_least=True)


def drain_50ms(bench: Bench) -> Iterator[Result]:
    """Measure with a server that takes 50 ms: whether all slots are kept filled."""
    ours, floor = _compared(bench.directory, backlog=800, delay_s=0.05, pairs=3)
    yield Result("drain_50ms", ours, "ev/s", 0.95, floor, at_least=True)


def _compared(directory: str, backlog: int, delay_s: float, pairs: int) -> tuple[float, float]:
    """Return events per second of a flush and of the same requests by httpx.AsyncClient."""
    turns = itertools.count()
    with server(delay_s) as api:
        env = {"VERSIONER_API_KEY": API_KEY}
        sent: list[tuple[str, bytes]] = []

        def ours() -> float:
            path = os.path.join(directory, f"{next(turns)}.db")
            sent[:] = _fill(path, backlog)
            settings = config.resolve({"db": path, "api_url": api.url, "concurrency": CONCURRENCY}, env, [])
            taken = seconds(lambda: flush.flush(settings, env, timeout=600))
            assert _delivered(path) == backlog
            return backlog / taken

        def floor() -> float:
            return backlog / seconds(lambda: asyncio.run(_send_all(api.url, sent)))

        return in_turns(ours, floor, pairs)


def _fill(path: str, backlog: int) -> list[tuple[str, bytes]]:
    """Queue builds of many products; returns (idempotency key, payload) of each."""
    valid = [
        events.validate(
            "build", {"product_name": f"product-{n % PRODUCTS}", "version": f"1.0.{n}", "status": "success"}
        )
        for n in range(backlog)
    ]
    with Outbox(path) as outbox:
        outbox.enqueue_all(valid)
    return _all(path, "SELECT event_id, payload FROM record ORDER BY id")


def _delivered(path: str) -> int:
    return _all(path, "SELECT count(*) FROM record WHERE state = 'delivered'")[0][0]


def _all(path: str, query: str) -> list[tuple]:
    connection = sqlite3.connect(path)
    rows = connection.execute(query).fetchall()
    connection.close()
    return rows


async def _send_all(url: str, sent: list[tuple[str, bytes]]) -> None:
    """POST everything with the agent's headers, CONCURRENCY at a time; nothing is written down."""
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": USER_AGENT,
        "Authorization": f"Bearer {API_KEY}",
    }
    left = iter(sent)
    async with httpx.AsyncClient(headers=headers, trust_env=False) as client:

        async def send() -> None:
            for event_id, payload in left:
                answer = await client.post(
                    url + ENDPOINTS["build"], content=payload, headers={"Idempotency-Key": event_id}
                )
                answer.raise_for_status()

        await asyncio.gather(*(send() for _ in range(CONCURRENCY)))

"""A steady load of streams on a real server, and windows in which something happens to it, by turns with calm ones."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import numpy as np

from sglang_specforge.traffic import stream_prompts

STREAMS, TOKENS, WINDOW_S = 4, 48, 10.0


@dataclass
class Load:
    """A number of streams, each followed by another; of each piece, when it came and how long after the one before."""

    came_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    requests: int = 0
    failures: list[str] = field(default_factory=list)

    async def run(self, url: str) -> None:
        prompts = stream_prompts(seed=5)
        async with (
            httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(STREAMS):
                tasks.create_task(self._keep_asking(client, prompts))

    async def _keep_asking(self, client: httpx.AsyncClient, prompts: Iterator[str]) -> None:
        while True:
            body = {
                "text": next(prompts), "stream": True,
                "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
            }  # fmt: skip
            self.requests += 1
            try:
                await self._ask(client, body)
            except (httpx.HTTPError, ValueError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        last_s, done = None, False
        async with client.stream("POST", "/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                now_s = time.monotonic()
                if last_s is not None:
                    self.came_s.append(now_s)
                    self.waited_s.append(now_s - last_s)
                last_s = now_s
        if not done:
            raise ValueError("the answer ended early")


class Window(NamedTuple):
    name: str
    begin_s: float
    end_s: float


async def by_turns(
    url: str, events: Mapping[str, Callable[[], AbstractContextManager]], minutes: float, window_s: float = WINDOW_S
) -> tuple[Load, list[Window]]:
    """A calm window before each of an event, for at least ``minutes``; each event comes at least once."""
    load, windows, end_s = Load(), [], time.monotonic() + 60 * minutes
    task = asyncio.create_task(load.run(url))
    await asyncio.sleep(window_s)  # warms up
    names = [name for event in events for name in ("calm", event)]
    while len(windows) < len(names) or time.monotonic() < end_s:
        name = names[len(windows) % len(names)]
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, events.get(name, nullcontext)())
            begun_s = time.monotonic()
            await asyncio.sleep(window_s)
            windows.append(Window(name, begun_s, time.monotonic()))
            await asyncio.to_thread(stack.close)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return load, windows


def waits_ms(load: Load, windows: list[Window], name: str) -> np.ndarray:
    """Milliseconds between two pieces of a stream, in the windows of a name."""
    came, waited = np.array(load.came_s), np.array(load.waited_s)
    inside = np.any([(came >= begin) & (came < end) for n, begin, end in windows if n == name], axis=0)
    return 1000 * waited[inside]


@contextlib.contextmanager
def in_background(url: str) -> Iterator[Load]:
    """The load runs in a thread for as long as the body does."""
    load, loop = Load(), asyncio.new_event_loop()
    task = loop.create_task(load.run(url))

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield load
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()

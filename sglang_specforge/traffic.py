"""A stream of varied chat requests at a server, and what came of them."""

import asyncio
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import httpx

from sglang_specforge.client import connection, failure

# Folders of the standard library whose text is data or fixtures rather than code.
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
_TIMEOUT_S = 300.0
Family = Literal["code", "prose", "numbers"]


def read_documents(family: Family | None = None) -> list[str]:
    """Text that every Python installation carries: the standard library's sources (``code``), the language reference
    (``prose``), or both; or tables of random ``numbers``."""
    if family == "numbers":
        return [_table(random.Random(seed)) for seed in range(100)]
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [p for p in sorted(root.rglob("*.py")) if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
    code = [p.read_text(encoding="utf-8", errors="ignore") for p in sources] if family != "prose" else []
    prose = list(topics.values()) if family != "code" else []
    return [document for document in code + prose if len(document) > 200]


def _table(rng: random.Random) -> str:
    rows = ([rng.randrange(10 ** rng.randint(1, 6)) for _ in range(8)] for _ in range(50))
    return "\n".join(" ".join(map(str, row)) for row in rows)


def stream_prompts(seed: int, lines: tuple[int, int] = (1, 6), family: Family | None = None) -> Iterator[str]:
    """Endless prompts: a few consecutive lines of a document each."""
    rng, documents = random.Random(seed), read_documents(family)
    weights = [len(d) for d in documents]
    while True:
        text = rng.choices(documents, weights)[0].splitlines(keepends=True)
        start = rng.randrange(len(text))
        if prompt := "".join(text[start : start + rng.randint(*lines)]).strip():
            yield prompt


@dataclass
class Tally:
    """What the requests came to, so far."""

    requests: int = 0
    completion_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def tokens_per_s(self) -> float:
        return self.completion_tokens / max(1e-9, self.elapsed_s)


async def drive(
    url: str,
    prompts: Iterator[str],
    tally: Tally,
    *,
    concurrency: int,
    max_tokens: int,
    temperature: float,
    requests: int | None = None,
    api_key: str | None = None,
) -> None:
    """Keep ``concurrency`` chat requests running, until ``requests`` were started or the task is cancelled."""
    left = iter(range(requests)) if requests is not None else None

    async def work(client: httpx.AsyncClient) -> None:
        while left is None or next(left, None) is not None:
            body = {
                "model": "default",
                "messages": [{"role": "user", "content": next(prompts)}],
                "max_tokens": max_tokens,
                "temperature": temperature,
            }
            try:
                answer = await client.post("/v1/chat/completions", json=body)
                answer.raise_for_status()
                tally.completion_tokens += answer.json()["usage"]["completion_tokens"]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                tally.failures.append(failure(error))
                await asyncio.sleep(0.5)
            tally.requests += 1

    limits = httpx.Limits(max_connections=concurrency)
    async with (
        httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits, **connection(api_key)) as client,
        asyncio.TaskGroup() as workers,
    ):
        for _ in range(concurrency):
            workers.create_task(work(client))

"""Real SGLang servers on this machine's CPU, one at a time, and the requests that the tests make."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_specforge.client import wait_until_captured
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.settings import DraftTrainingSettings
from sglang_specforge.settings_flags import flag_of
from sglang_specforge.traffic import stream_prompts
from tests.e2e.spares import QuickServer

TARGET = Path(__file__).parents[2] / "examples" / "tiny_target"
SERVING = [
    "--max-total-tokens",
    16384,
    "--max-running-requests",
    16,
    "--random-seed",
    0,
    "--log-level",
    "warning",
    "--sleep-on-idle",
]

TRAINING = {
    "batch-tokens": 512, "holdout-every": 2, "ttt-steps": 3, "learning-rate": 2e-3, "loss-on": "all",
    "warmup-steps": 10, "draft-vocab-size": 768, "gate": "off",
}  # fmt: skip


class Client:
    """What a user's program does with a server."""

    def __init__(self, server: ServerProcess, run_dir: Path) -> None:
        self.server, self.run_dir = server, run_dir
        self._http = httpx.Client(base_url=server.url, timeout=120, trust_env=False)

    def generate(self, prompt: str | list[int], tokens: int = 48, **sampling: Any) -> dict[str, Any]:
        """One answer of ``/generate``, greedy unless told otherwise; raises for anything but 200."""
        parameters = {"temperature": 0, "max_new_tokens": tokens, **sampling}
        given = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
        answer = self._http.post("/generate", json={**given, "sampling_params": parameters})
        answer.raise_for_status()
        return answer.json()

    def generate_all(self, prompts: list[Any], tokens: int = 48, workers: int = 6) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, tokens), prompts))

    def post(self, path: str, **kwargs: Any) -> httpx.Response:
        return self._http.post(path, **kwargs)

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def status(self) -> dict[str, Any]:
        return self.server.status()


def prompts(count: int, seed: int = 0) -> list[str]:
    return list(islice(stream_prompts(seed), count))


def wait_for(what: str, condition: Callable[[], Any], limit_s: float = 90.0) -> Any:
    """The condition's first true value; fails with ``what`` was waited for."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"not within {limit_s:.0f} s: {what}")


def run_module(*command: Any) -> str:
    """What a command of ours prints."""
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def outputs(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def settled(client: Client) -> dict[str, Any]:
    """A status in which nothing is under way, and of which the trainer has spoken twice."""
    captured, heartbeats, heard_s = -1, 0, 0.0  # the last heartbeat that counts was heard by heard_s

    def look() -> dict[str, Any] | None:
        nonlocal captured, heartbeats, heard_s
        asked_s = time.monotonic()
        status = client.status()  # takes seconds where a layout sleeps: when it was heard is known to within those
        answered_s, silent_s = time.monotonic(), status["trainer"]["silent_s"]
        if status["tokens"]["captured"] != captured:
            captured, heartbeats, heard_s = status["tokens"]["captured"], 0, answered_s
        elif asked_s - silent_s >= heard_s:
            heartbeats, heard_s = heartbeats + 1, answered_s - silent_s
        under_way = status["tokens"]["in_flight"] or any(export["queued_passes"] for export in status["export"])
        return status if heartbeats >= 2 and not under_way else None

    return wait_for("captured tokens come to rest", look)


def assert_every_token_is_accounted_for(status: dict[str, Any]) -> None:
    tokens = status["tokens"]
    fates = tokens["trained"] + tokens["held_out"] + tokens["buffered"] + sum(tokens["dropped"].values())
    assert tokens["captured"] == fates, tokens


def customize_servers(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Servers that are started from here on run the ``sitecustomize`` of a folder beside this file."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / folder), prepend=os.pathsep)


def training_flags(settings: dict[str, Any]) -> list[Any]:
    settings = {"drafting": "always"} | settings  # a draft that does not pay here is still looked at
    names = {name: flag_of(DraftTrainingSettings, name.replace("-", "_"), "draft_training_") for name in settings}
    return ["--enable-draft-training", *(part for name, value in settings.items() for part in (names[name], value))]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Client]]:
    """Starts a server in place of the one before it (two cores carry one at a time), or ``beside`` it."""
    running: dict[tuple, Client] = {}
    stopping = ThreadPoolExecutor()

    def begin(
        *arguments: Any,
        training: dict[str, Any] | None = None,
        model: Path = TARGET,
        beside: bool = False,
        kind: type[ServerProcess] = QuickServer,
        **ranks: int,
    ) -> Client:
        key = (arguments, repr(training), model, beside, kind, tuple(ranks.items()))
        if key in running:
            return running[key]
        # To end takes as long as SGLang looks for SIGTERM, every 5 s, and nothing else: the next one starts meanwhile.
        ending = []
        while running and not beside:
            ending.append(stopping.submit(running.popitem()[1].server.stop))
        folder = tmp_path_factory.mktemp("server")
        flags: list[Any] = []
        if training is not None:
            flags = training_flags({"run-dir": folder / "run"} | training)
        server = kind.start(folder / "log", ["--model-path", model, *SERVING, *arguments, *flags], **ranks)
        for end in ending:
            end.result()
        running[key] = Client(server, folder / "run")
        if training is not None and training.get("trainer") != "none":
            wait_until_captured(server.url, limit_s=90)
            wait_for("a word from the trainer", lambda: server.status()["trainer"]["silent_s"] is not None)
        return running[key]

    yield begin
    while running:
        running.popitem()[1].server.stop()


@pytest.fixture(scope="session")
def reference(start: Callable[..., Client]) -> Callable[..., list[list[int]]]:
    """Greedy outputs of a server without speculation and without the flag, computed once for each model."""
    known: dict[Path, list[list[int]]] = {}

    def of(model: Path = TARGET) -> list[list[int]]:
        if model not in known:
            client = start("--dtype", "float32", model=model)
            assert client.get("/draft/status").status_code == 404
            known[model] = outputs(client.generate_all(prompts(50)))
        return known[model]

    return of

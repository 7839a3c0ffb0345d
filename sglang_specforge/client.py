"""Asking a server that runs with draft training; commands end with an error where it does not answer as one."""

import contextlib
import functools
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn

import httpx
import pydantic
import typer
from rich.console import Console

from sglang_specforge.settings import Run

Url = Annotated[str, typer.Option("--url", "--server", help="Address of the server.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="SGLANG_API_KEY", help="The server's --admin-api-key, or its --api-key where that is alone."),
]
GeneratingKey = Annotated[str | None, typer.Option(envvar="SGLANG_API_KEY", help="The server's --api-key.")]
_POLL_S = 0.1
COPY_LIMIT_S = 600  # of a checkpoint's way
_REFUSALS = (400, 404, 409, 422)
DEFAULT_URL = "http://127.0.0.1:30000"

errors = Console(stderr=True)


class Unanswered(RuntimeError):
    """A server gave no answer that can be used, or refused; the message says why, and what to do."""


def connection(api_key: str | None) -> dict[str, Any]:
    """httpx's arguments: the server's key, no proxy, and whom ``$SSL_CERT_FILE`` says to trust.

    Raises:
        Unanswered: that file is of no use.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {"headers": headers, "trust_env": False, "verify": _authorities(os.environ.get("SSL_CERT_FILE"))}


@functools.lru_cache(maxsize=1)
def _authorities(file: str | None) -> ssl.SSLContext:
    """Made once, because reading them takes longer than most requests."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise Unanswered(f"SSL_CERT_FILE {file!r} cannot be used ({error}); it has to hold PEM certificates") from error


def request(method: str, url: str, path: str, api_key: str | None, **kwargs: Any) -> httpx.Response:
    """The server's answer: success, or a refusal of what was asked (``refusal``).

    Raises:
        Unanswered: for anything else.
    """
    try:
        answer = httpx.request(method, url.rstrip("/") + path, **connection(api_key), **kwargs)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        what_to_do = "is the server up, and its address right?"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            what_to_do = "set SSL_CERT_FILE to a file with the certificate of whom to trust"
        raise Unanswered(f"{url} does not answer ({error}); {what_to_do}") from error
    if answer.status_code == 404 and refusal(answer) in (None, "Not Found"):
        raise Unanswered(f"the server at {url} runs without --enable-draft-training")
    if answer.status_code in (401, 403):
        raise Unanswered(
            f"the server at {url} wants its key; give --api-key (or set SGLANG_API_KEY): the server's "
            "--admin-api-key, or its --api-key where that is alone"
        )
    if answer.is_error and refusal(answer) is None:
        raise Unanswered(f"{url}{path} answered {answer.status_code}: {answer.text[:300]}")
    return answer


def refusal(answer: httpx.Response) -> str | None:
    """Why the server refused what was asked; None where it did not, or in no way that is understood here."""
    if answer.status_code not in _REFUSALS:
        return None
    try:
        return answer.json().get("message")
    except ValueError:
        return None


def failure(error: BaseException) -> str:
    """What became of a request that raised, in the server's words where it has some."""
    if isinstance(error, httpx.HTTPStatusError):
        answer = error.response
        return f"the server answered {answer.status_code}: {refusal(answer) or answer.text[:300]}"
    return f"{type(error).__name__}: {error}"


def accepted(method: str, url: str, path: str, api_key: str | None, **kwargs: Any) -> httpx.Response:
    """The server's answer. Raises Unanswered: also for a refusal."""
    answer = request(method, url, path, api_key, **kwargs)
    if (why := refusal(answer)) is not None:
        raise Unanswered(f"{url} refused: {why}")
    return answer


def ask(method: str, url: str, path: str, api_key: str | None, **kwargs: Any) -> httpx.Response:
    """``request`` of a command, which ends with exit code 2 where there is no answer, and with 1 at a refusal."""
    with or_fail():
        answer = request(method, url, path, api_key, **kwargs)
    if (why := refusal(answer)) is not None:
        fail(why, code=1)
    return answer


def run_of(url: str, api_key: str | None = None) -> Run:
    """What the server says of itself.

    Raises:
        Unanswered: it does not, or not in a way that is understood here.
    """
    answer = request("GET", url, "/draft/run", api_key, timeout=10)
    try:
        return Run.model_validate_json(answer.content)
    except pydantic.ValidationError as error:
        raise Unanswered(f"the server at {url} runs another version of sglang-specforge: {error}") from error


def upload_checkpoint(url: str, api_key: str | None, checkpoint: Path) -> str:
    """Copy a draft checkpoint to the server's disk; returns its path there.

    Raises:
        Unanswered: the server does not take it.
        OSError: it cannot be read.
    """
    with opened(checkpoint) as files:
        answer = accepted("POST", url, "/draft/uploads", api_key, files=files, timeout=COPY_LIMIT_S)
    return answer.json()["path"]


@contextlib.contextmanager
def opened(checkpoint: Path) -> Iterator[dict[str, IO[bytes]]]:
    """A checkpoint's files, as ``/draft/versions`` and ``/draft/uploads`` take them. Raises OSError."""
    with (checkpoint / "config.json").open("rb") as config, (checkpoint / "model.safetensors").open("rb") as weights:
        yield {"config": config, "weights": weights}


class NotCaptured(RuntimeError):
    """A server does not capture for the one who reads its stream; the message says why."""


def wait_until_captured(url: str, api_key: str | None = None, limit_s: float = 30.0) -> None:
    """Until the server has seen that its stream is read: requests from then on are captured whole.

    Raises:
        NotCaptured: not within ``limit_s`` seconds, or for a reader on another machine.
        Unanswered: the server does not answer.
    """
    end_s = time.monotonic() + limit_s
    while True:
        status = _status(url, api_key)
        if lease := status["reader"]["lease"]:
            raise NotCaptured(
                f"the server at {url} sends its states to {lease['spans_endpoint']}; end the trainer there"
            )
        if not any(reasons := [e["failure"] or e["closed"] for e in status["export"]]):
            return
        if time.monotonic() > end_s:
            raise NotCaptured(f"the server at {url} captures nothing: {next(filter(None, reasons))}")
        time.sleep(_POLL_S)


def _status(url: str, api_key: str | None) -> dict[str, Any]:
    return request("GET", url, "/draft/status", api_key, timeout=30).json()


@contextlib.contextmanager
def or_fail() -> Iterator[None]:
    """Of a command that a server has to answer, and files have to be there for: ends it with exit code 2."""
    try:
        yield
    except (Unanswered, OSError) as error:
        fail(str(error))


def fail(message: str, code: int = 2) -> NoReturn:
    errors.print(f"error: {message}", style="red", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def writable(file: Path | None) -> Path | None:
    """Of an option: said before the work whose outcome could not be written afterwards."""
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise typer.BadParameter(f"{file} cannot be written; give a file in a folder that is there")
    return file

"""Answers of the target itself, kept on disk as they come, so that a run that was stopped asks for none twice."""

import hashlib
import json
import threading
from pathlib import Path

import httpx
import numpy as np

from sglang_specforge.client import connection
from sglang_specforge.images import as_sent
from sglang_specforge.prepare.conversations import Skipped

_TIMEOUT_S = 600.0


class Regenerator:
    """Asks a server's ``/generate``; threads may share it."""

    def __init__(self, url: str, api_key: str | None, kept: Path, max_new_tokens: int, temperature: float) -> None:
        self._sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self._client = httpx.Client(base_url=url, timeout=_TIMEOUT_S, **connection(api_key))
        self._known = _read(kept)
        self.kept_before = len(self._known)
        self._lock = threading.Lock()
        self._file = kept.open("a", encoding="utf-8")

    def answer(self, prompt_ids: list[int], images: list[str]) -> list[int]:
        """Token ids that the target generates after a prompt, which shows the images that are referred to.

        Raises:
            OSError: one of them can no longer be read.
            Skipped: the server refuses this prompt, as one that is too long for it.
            httpx.HTTPError: it does not answer, or refuses all.
        """
        sent = as_sent(images)
        key = self._key(prompt_ids, sent)
        if key in self._known:
            return self._known[key]
        body = {"input_ids": prompt_ids, "sampling_params": self._sampling, "image_data": sent or None}
        answer = self._client.post("/generate", json=body)
        if answer.status_code == httpx.codes.BAD_REQUEST:
            raise Skipped("refused by the server")
        answer.raise_for_status()
        output_ids = answer.json()["output_ids"]
        with self._lock:
            self._known[key] = output_ids
            self._file.write(json.dumps({"key": key, "output_ids": output_ids}) + "\n")
            self._file.flush()
        return output_ids

    def close(self) -> None:
        self._file.close()
        self._client.close()

    def _key(self, prompt_ids: list[int], images: list[str]) -> str:
        digest = hashlib.sha256(np.asarray(prompt_ids, np.int32).tobytes())
        digest.update("".join(images).encode())
        digest.update(json.dumps(self._sampling, sort_keys=True).encode())
        return digest.hexdigest()


def _read(kept: Path) -> dict[str, list[int]]:
    """What is there already; a last line that was cut off in writing is taken back."""
    if not kept.exists():
        return {}
    lines = kept.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        kept.write_text("".join(lines), encoding="utf-8")
    return {entry["key"]: entry["output_ids"] for entry in map(json.loads, lines)}

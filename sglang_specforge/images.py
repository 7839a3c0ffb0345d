"""Images that conversations show: what data call them, and what a server is sent.

A reference is a file's absolute path, a URL, or a ``data:`` URL that holds the image itself.
"""

import base64
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_URLS = ("http://", "https://", "data:")


def refer(given: Any, folder: Path) -> str | None:
    """Reference of an image as data have it, None where it is not there, or not to be read.

    Args:
        given: a path or URL; or an object of datasets' (``bytes``, ``path``) or OpenAI's (``url``).
        folder: of the data, where relative paths begin.
    """
    if isinstance(given, dict):
        if isinstance(held := given.get("bytes"), bytes):
            return _data_url(held)
        given = given.get("url") or given.get("path")
    if not isinstance(given, str) or not given:
        return None
    if given.startswith(_URLS):
        return given
    file = (folder / given.removeprefix("file://")).absolute()
    return str(file) if file.is_file() and os.access(file, os.R_OK) else None


def as_sent(references: Iterable[str]) -> list[str]:
    """For ``image_data`` of a request to ``/generate``; a server need not be able to read files of this machine.

    Raises:
        OSError: a file is no longer there.
    """
    return [r if r.startswith(_URLS) else _data_url(Path(r).read_bytes()) for r in references]


def _data_url(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"

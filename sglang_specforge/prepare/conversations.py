"""Rows of a dataset as messages, whatever their layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets

Message = dict[str, str]  # role and content
Layout = Literal["auto", "sharegpt", "ultrachat", "messages", "text"]

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


class Skipped(ValueError):
    """A row that gives nothing to learn from; the message is the reason it is counted under."""


def read_rows(source: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a local file (by its suffix) or of a Hugging Face dataset, streamed; each with its ``slice``.

    A row's own column of that name counts, or else the name of the file or dataset.

    Raises:
        FileNotFoundError: ``source`` looks like a file and is not there.
        ValueError: a file of another suffix, or that cannot be read as what its suffix says.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"{source}: {path.suffix or 'no suffix'} is not read; accepted are {', '.join(_BUILDERS)}")
        given = {"path": _BUILDERS[path.suffix], "data_files": source, "split": "train"}
    elif path.suffix in _BUILDERS:
        raise FileNotFoundError(f"{source} is not there")
    else:
        given = {"path": source, "split": split}
    try:
        for row in datasets.load_dataset(**given, streaming=True):
            yield {**row, "slice": str(row.get("slice") or path.stem)}
    except StopIteration:  # what datasets makes of a file without rows
        return
    except (ValueError, OSError) as error:
        raise ValueError(f"{source} cannot be read: {error}; mend it, or leave it out") from error


def to_messages(row: dict[str, Any], layout: Layout) -> list[Message] | str:
    """Messages of a conversation, or the text of a plain one.

    ``sharegpt`` reads ``conversations`` (``from`` and ``value``), ``ultrachat`` the alternating strings of ``data``,
    ``messages`` those of OpenAI's API, ``text`` the column of that name; ``auto`` takes the first that has its column.

    Raises:
        Skipped: the row is not of that layout.
    """
    for name, column, kind, read in _LAYOUTS:
        if layout in (name, "auto") and row.get(column):
            if not isinstance(row[column], kind):
                raise Skipped(f"{column} is no {kind.__name__}")
            return read(row[column])
    raise Skipped("not of the layout" if layout != "auto" else "of no known layout")


def _sharegpt(turns: list[dict[str, Any]]) -> list[Message]:
    return [_message(_part(turn, "from", "role"), _part(turn, "value", "content")) for turn in turns]


def _ultrachat(turns: list[str]) -> list[Message]:
    return [_message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]


def _messages(turns: list[dict[str, Any]]) -> list[Message]:
    return [_message(_part(turn, "role"), _text(_part(turn, "content"))) for turn in turns]


def _part(turn: Any, *names: str) -> Any:
    """The first of ``names`` that the turn has."""
    if not isinstance(turn, dict):
        raise Skipped("a turn is no object")
    return next((turn[name] for name in names if name in turn), None)


def _text(content: Any) -> Any:
    """OpenAI's content in parts as one text, where all of them are text."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content


def _message(role: Any, content: Any) -> Message:
    if role not in _ROLES:
        raise Skipped(f"role {role!r} is unknown")
    if not isinstance(content, str):
        raise Skipped("content is no text")
    return {"role": _ROLES[role], "content": content}


_LAYOUTS = (
    ("sharegpt", "conversations", list, _sharegpt),
    ("ultrachat", "data", list, _ultrachat),
    ("messages", "messages", list, _messages),
    ("text", "text", str, str),
)

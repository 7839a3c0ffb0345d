"""Rows of a dataset as conversations, whatever their layout."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets

Message = dict[str, Any]  # role and content (text, or parts where it shows images), and what else chat templates read
Layout = Literal["auto", "sharegpt", "ultrachat", "messages", "text"]

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "developer": "developer",
    "tool": "tool",
}  # fmt: skip
_READ_BY_TEMPLATES = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
_BUILDERS = {".json": "json", ".parquet": "parquet", ".txt": "text"}
_ACCEPTED = (".jsonl", *_BUILDERS)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Skipped(ValueError):
    """A row, or a part of it, that gives nothing to learn from; the message is the reason it is counted under."""


class Row(NamedTuple):
    """Of a source."""

    columns: dict[str, Any]
    slice: str  # its own column of that name counts, or else the name of the file or dataset
    folder: Path  # where paths of images begin


class Conversation(NamedTuple):
    """What a chat template renders."""

    messages: list[Message]
    tools: list[Any] | None = None  # that the assistant may call, as in a request to OpenAI's API

    @property
    def turns(self) -> list[int]:
        """Where the assistant's messages are."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def images(self) -> list[Any]:
        """Those that it shows, in order."""
        contents = [message["content"] for message in self.messages if isinstance(message["content"], list)]
        return [part["image"] for content in contents for part in content if part["type"] == "image"]

    def until(self, end: int) -> "Conversation":
        return self._replace(messages=self.messages[:end])


def read_rows(source: str, split: str) -> Iterator[Row | Skipped]:
    """Rows of a local file (by its suffix) or a Hugging Face dataset, streamed; ``Skipped`` for lines that are no JSON.

    Raises:
        FileNotFoundError: ``source`` looks like a file and is not there.
        ValueError: a file of another suffix, or that cannot be read as what its suffix says.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in _ACCEPTED:
            raise ValueError(f"{source}: {path.suffix or 'no suffix'} is not read; accepted are {', '.join(_ACCEPTED)}")
    elif path.suffix in _ACCEPTED:
        raise FileNotFoundError(f"{source} is not there")
    try:
        for columns in _json_lines(path) if path.suffix == ".jsonl" else _streamed(source, split):
            if isinstance(columns, Skipped):
                yield columns
            else:
                yield Row(columns, str(columns.get("slice") or path.stem), path.parent)
    except StopIteration:  # what datasets makes of a file without rows
        return
    except (ValueError, OSError) as error:
        raise ValueError(f"{source} cannot be read: {error}; mend it, or leave it out") from error


def _json_lines(file: Path) -> Iterator[dict[str, Any] | Skipped]:
    """A line by itself, where Arrow would give up a file for one that is broken or has columns of other types."""
    with file.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                columns = json.loads(line)
                if _SURROGATE.search(line):
                    json.dumps(columns, ensure_ascii=False).encode()
                yield columns if isinstance(columns, dict) else Skipped("no object")
            except UnicodeError:
                yield Skipped("not Unicode")
            except ValueError:
                yield Skipped("no JSON")


def _streamed(source: str, split: str) -> datasets.IterableDataset:
    builder = _BUILDERS.get(Path(source).suffix)
    given = {"path": builder, "data_files": source, "split": "train"} if builder else {"path": source, "split": split}
    return _with_images_as_they_came(datasets.load_dataset(**given, streaming=True))


def _with_images_as_they_came(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """Bytes and path, not pixels."""
    for name, feature in (rows.features or {}).items():
        if (undecoded := _undecoded(feature)) != feature:
            rows = rows.cast_column(name, undecoded)
    return rows


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature), feature.length)
    return feature


def to_conversation(row: dict[str, Any], layout: Layout) -> Conversation | str:
    """A row's conversation, with the tools of a column of that name, or its plain text.

    ``sharegpt`` reads ``conversations`` (``from`` and ``value``), ``ultrachat`` the alternating strings of ``data``,
    ``messages`` those of OpenAI's API, ``text`` the column of that name; ``auto`` takes the first that has its column.

    Raises:
        Skipped: the row is not of that layout.
    """
    for name, column, kind, read in _LAYOUTS:
        if layout in (name, "auto") and row.get(column):
            if not isinstance(row[column], kind):
                raise Skipped(f"{column} is no {kind.__name__}")
            found = read(row[column])
            return found if isinstance(found, str) else Conversation(found, _tools(row.get("tools")))
    raise Skipped("not of the layout" if layout != "auto" else "of no known layout")


def _sharegpt(turns: list[dict[str, Any]]) -> list[Message]:
    return [_message(_part(turn, "from", "role"), _content(_part(turn, "value", "content")), turn) for turn in turns]


def _ultrachat(turns: list[str]) -> list[Message]:
    return [_message(("user", "assistant")[i % 2], turn, {}) for i, turn in enumerate(turns)]


def _messages(turns: list[dict[str, Any]]) -> list[Message]:
    return [_message(_part(turn, "role"), _content(_part(turn, "content")), turn) for turn in turns]


def _part(turn: Any, *names: str) -> Any:
    """The first of ``names`` that the turn has."""
    if not isinstance(turn, dict):
        raise Skipped("a turn is no object")
    return next((turn[name] for name in names if name in turn), None)


def _content(content: Any) -> Any:
    """OpenAI's content in parts as one text, where all of them are text."""
    if not isinstance(content, list):
        return content
    parts = [_content_part(part) for part in content]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _content_part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": str(part.get("text") or "")}
    if kind not in ("image", "image_url"):
        raise Skipped("content is neither text nor images")
    given = next((part[name] for name in ("image_url", "image", "url", "path") if part.get(name)), None)
    return {"type": "image", "image": given}


def _message(role: Any, content: Any, turn: dict[str, Any]) -> Message:
    if role not in _ROLES:
        raise Skipped(f"role {role!r} is unknown")
    beside = {key: _present(turn[key]) for key in _READ_BY_TEMPLATES if turn.get(key)}
    if "tool_calls" in beside:
        beside["tool_calls"] = [_tool_call(call) for call in parsed(beside["tool_calls"], list, "tool_calls")]
        content = content or ""
    if not isinstance(content, str | list):
        raise Skipped("content is no text")
    return {"role": _ROLES[role], "content": content, **beside}


def _tool_call(call: Any) -> Any:
    """Arguments are an object for the template, as SGLang has them (``normalize_assistant_tool_call_arguments``)."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Skipped("a tool call has no function")
    arguments = parsed(function.get("arguments") or {}, dict, "a tool call's arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: Any) -> list[Any] | None:
    return (parsed(_present(tools), list, "tools") or None) if tools else None


def parsed(value: Any, kind: type, name: str) -> Any:
    """An object or list as it is, or from JSON, as datasets keep what has no fixed columns. Raises Skipped."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Skipped(f"{name} is no JSON") from None
    if not isinstance(value, kind):
        raise Skipped(f"{name} is no {kind.__name__}")
    return value


def _present(value: Any) -> Any:
    """Without the keys that Arrow gives to every object where only others have them."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


_LAYOUTS = (
    ("sharegpt", "conversations", list, _sharegpt),
    ("ultrachat", "data", list, _ultrachat),
    ("messages", "messages", list, _messages),
    ("text", "text", str, str),
)

"""Images of a row, at the places where its conversation shows them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_specforge.images import refer
from sglang_specforge.prepare.conversations import Conversation, Message, Skipped

_HERE = "<image>"  # in texts of data that have a column of images


def illustrate(conversation: Conversation, columns: dict[str, Any], folder: Path) -> Conversation:
    """The conversation with references for images (``sglang_specforge.images``).

    They are those of the messages' parts. Parts that name none, and ``<image>`` in texts, show those of the column
    ``images`` or ``image``, in order; where there are neither, the first user's text comes after all of them.

    Args:
        folder: where paths begin.

    Raises:
        Skipped: an image is not there, there are more or fewer than are shown, or an assistant shows one.
    """
    given = columns.get("images") or columns.get("image") or []
    given = given if isinstance(given, list) else [given]
    messages = conversation.messages
    if given and not conversation.images:
        messages = _with_places(messages, len(given))
    beside = iter(given)
    messages = [{**message, "content": _referred(message, beside, folder)} for message in messages]
    if next(beside, None) is not None:
        raise Skipped("it has more images than it shows")
    return conversation._replace(messages=messages)


def _with_places(messages: list[Message], count: int) -> list[Message]:
    contents = [message["content"] for message in messages]
    if not any(_HERE in content for content in contents):
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
        contents[first] = count * _HERE + contents[first]
    pairs = zip(messages, contents, strict=True)
    return [{**message, "content": _parts(content) if _HERE in content else content} for message, content in pairs]


def _parts(text: str) -> list[dict[str, Any]]:
    before, *after = text.split(_HERE)
    parts = [{"type": "text", "text": before}]
    for text in after:
        parts += [{"type": "image", "image": None}, {"type": "text", "text": text}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _referred(message: Message, beside: Iterator[Any], folder: Path) -> str | list[dict[str, Any]]:
    content = message["content"]
    if isinstance(content, str):
        return content
    if message["role"] == "assistant":
        raise Skipped("an assistant shows an image")
    return [_refer(part["image"], beside, folder) if part["type"] == "image" else part for part in content]


def _refer(given: Any, beside: Iterator[Any], folder: Path) -> dict[str, Any]:
    if given is None and (given := next(beside, None)) is None:
        raise Skipped("it shows more images than it has")
    if (reference := refer(given, folder)) is None:
        raise Skipped("an image is not there")
    return {"type": "image", "image": reference}

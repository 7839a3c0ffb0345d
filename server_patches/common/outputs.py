"""Which draft versions served a request, in the order of their turns; its answer says so, in ``meta_info`` and, of
OpenAI's API, in ``metadata``."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

KEY = "draft_versions"
_newest: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # by Req
_untold: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()


def note(reqs: Iterable[Any], version: int) -> None:
    """These requests were verified with drafts of this version."""
    for req in reqs:
        if _newest.get(req) != version:
            _newest[req] = version
            _untold.setdefault(req, []).append(version)


def take(req: Any) -> list[int]:
    """What no output of the request has said yet."""
    return _untold.pop(req, [])


def add_to_metadata(response: Any, serving: Any, request: Any, ret: list[dict[str, Any]], *args: Any) -> None:
    """AFTER the functions that build whole answers of OpenAI's API (``seams.OPENAI_ANSWERS``): of all their choices,
    beside the version of the target's weights."""
    metadata = getattr(response, "metadata", None)  # an error has none
    if metadata is not None:
        metadata[KEY] = list(dict.fromkeys(version for one in ret for version in one["meta_info"].get(KEY) or ()))

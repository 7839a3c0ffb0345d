"""Which draft versions served a request, in the order of their turns; its answer's ``meta_info`` says so."""

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

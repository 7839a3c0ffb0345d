"""Which draft versions served a request: ``meta_info["draft_versions"]`` of its answer, in the order of their turns."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

_KEY = "draft_versions"
_newest: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # by Req
_untold: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()


def note(reqs: Iterable[Any], version: int) -> None:
    """These requests were verified with drafts of this version."""
    for req in reqs:
        if _newest.get(req) != version:
            _newest[req] = version
            _untold.setdefault(req, []).append(version)


def choose_streamer(result: type[SchedulerOutputStreamer], scheduler: Any) -> type[SchedulerOutputStreamer]:
    """AFTER ``Scheduler.get_output_streamer_class``. SGLang's Rust server takes no outputs of others."""
    return result if scheduler.rust_server is not None else _Streamer


@dataclass(kw_only=True, slots=True)
class _Streamer(SchedulerOutputStreamer):
    """The tokenizer manager appends what each output of a request brings to its list."""

    has_additional_customized_info: ClassVar[bool] = True

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[list[int]]]:
        return {_KEY: [_untold.pop(req, []) for req in reqs]}

"""Answers name their draft versions: the tokenizer manager appends what each output of a request brings to its list."""

from dataclasses import dataclass
from typing import Any, ClassVar

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from server_patches.common import outputs


def choose_streamer(result: type[SchedulerOutputStreamer], scheduler: Any) -> type[SchedulerOutputStreamer]:
    """AFTER ``Scheduler.get_output_streamer_class``. SGLang's Rust server takes no outputs of others."""
    return result if scheduler.rust_server is not None else _Streamer


@dataclass(kw_only=True, slots=True)
class _Streamer(SchedulerOutputStreamer):
    has_additional_customized_info: ClassVar[bool] = True

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[list[int]]]:
        return {outputs.KEY: [outputs.take(req) for req in reqs]}

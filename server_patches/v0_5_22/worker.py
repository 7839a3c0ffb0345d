"""The speculative worker: its target packs last hidden states; aborts are seen on their way to the tokenizer."""

from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.runtime_context import get_parallel

from server_patches.common import process
from server_patches.common.capture import note_abort
from server_patches.v0_5_22.packing import pack
from server_patches.v0_5_23.worker import install


def attach(result: None, worker: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``EAGLEWorkerV2.__init__``."""
    process.attach(worker, get_parallel().dp_rank or 0, pack, install)


def before_output(sender: Any, output: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``SenderWrapper.send_output(output, recv_obj)``."""
    if isinstance(output, AbortReq):
        note_abort(output.rid)

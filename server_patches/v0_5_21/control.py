"""Numbers for every rank, and the ranks' answers, by way of two methods of ``Scheduler``."""

import logging
from typing import Any

from sglang.srt.managers.io_struct import SetInternalStateReqOutput

from server_patches.common.control import orders, rank_state

logger = logging.getLogger(__name__)


def around_set(original: Any, scheduler: Any, recv_req: Any) -> SetInternalStateReqOutput:
    """AROUND ``Scheduler.set_internal_state``: all of ours, or none; a request with others' keys is not ours."""
    ours, asked = orders(lambda: scheduler.forward_ct), recv_req.server_args
    if not asked or not asked.keys() <= ours.keys():
        return original(scheduler, recv_req)
    for key, value in asked.items():
        if refusal := ours[key].refusal(int(value)):
            logger.warning("Updating %s to %s is rejected: %s", key, value, refusal)
            return SetInternalStateReqOutput(updated=False)
    for key, value in asked.items():
        ours[key].apply(int(value))
    return SetInternalStateReqOutput(updated=True)


def after_get(result: Any, scheduler: Any, recv_req: Any) -> None:
    """AFTER ``Scheduler.get_internal_state``."""
    result.internal_state.update(rank_state())

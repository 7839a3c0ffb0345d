"""Numbers for every rank, and the ranks' answers, by way of ``SchedulerInternalStateController``."""

from typing import Any

from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler

from server_patches.common.control import Order, orders, rank_state


def add_handlers(handlers: dict[str, Any], controller: Any) -> dict[str, Any]:
    """AFTER ``_update_handlers``."""
    ours = orders(lambda: controller.scheduler.forward_ct)
    return handlers | {key: _handler(order) for key, order in ours.items()}


def add_state(result: None, controller: Any, state: dict[str, Any]) -> None:
    """AFTER ``_add_speculative``."""
    state.update(rank_state())


def _handler(order: Order) -> _UpdateHandler:
    def validate(key: str, value: Any) -> None:
        if refusal := order.refusal(int(value)):
            raise UpdateRejected(refusal)

    return _UpdateHandler(validate, lambda key, value: order.apply(int(value)))

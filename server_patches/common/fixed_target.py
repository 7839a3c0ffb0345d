"""The target stays what it was started as: a draft is trained with the head in its folder, and judged by its states."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from server_patches.common.seams import UPDATES
from sglang_specforge.settings import Run

logger = logging.getLogger(__name__)

Update = Callable[..., Awaitable[tuple[Any, ...]]]


def refusal_of(name: str) -> Update:
    """AROUND the tokenizer manager's method ``name``, one of ``UPDATES``: no rank hears of it. SGLang answers 400."""

    async def refuse(original: Update, manager: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        why = (
            f"{name} is refused under --enable-draft-training, whose trainer learns from the target in "
            f"{Run.inherited().target_path}; start the server anew with other weights as --model-path"
        )
        logger.warning("draft training: %s", why)
        return (False, why, 0)[: UPDATES[name]]

    return refuse

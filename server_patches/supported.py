"""The SGLang versions that are supported, from the first to the last, and the support of the one that is installed."""

import sys
from types import ModuleType

import sglang
from packaging.version import Version
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from server_patches import v0_5_17, v0_5_20, v0_5_21, v0_5_22, v0_5_23
from server_patches.common.seams import LAYER
from server_patches.targets import verify

SUPPORTS = (v0_5_17, v0_5_20, v0_5_21, v0_5_22, v0_5_23)
SUPPORTED = f"sglang {SUPPORTS[0].VERSION} to {SUPPORTS[-1].VERSION}"


def support_of(version: str) -> ModuleType:
    """The newest support that is not newer than this version; the seams decide whether it fits."""
    wanted = Version(version)
    older = [support for support in SUPPORTS if Version(support.VERSION) <= wanted]
    return older[-1] if older else SUPPORTS[0]


def installed() -> ModuleType:
    """The support of the SGLang that is installed."""
    return support_of(sglang.__version__)


def check() -> None:
    """Raises IncompatibleSGLang where the installed SGLang is not one the hooks were written for."""
    verify(installed().TARGETS, SUPPORTED, sglang.__version__)


def register_scheduler_hooks() -> None:
    """Scheduler processes of a run: capture, swap and their counters, and what drafts have that SGLang's model lacks.
    Nothing in any other process."""
    if "sglang.srt.managers.scheduler" in sys.modules:
        from server_patches.common import qk_norm

        HookRegistry.register(f"{LAYER}.__init__", qk_norm.add_norms, HookType.AFTER)
        installed().register_scheduler_hooks()

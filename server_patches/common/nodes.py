"""A server of several nodes: each is started by a command of its own, and all have to begin with the same draft.

The first has the control service and, unless it is started apart, the trainer. The others keep the draft of their ranks
in step, so they read the versions of the run folder, which has to be on storage that all of them share.
"""

import argparse
import uuid
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from sglang.srt.runtime_context import get_parallel

from sglang_specforge.checkpoint import noted_content
from sglang_specforge.settings import Run


class _Found(NamedTuple):
    """By a rank."""

    node: int
    draft: str | None  # SHA-256 of the draft's weights
    version: int
    run_dir: Path
    shares_folder: bool


def count(args: argparse.Namespace) -> int:
    return getattr(args, "nnodes", 1) or 1


def rank(args: argparse.Namespace) -> int:
    return (getattr(args, "node_rank", 0) or 0) if count(args) > 1 else 0


def check_alike(run: Run) -> None:
    """Every rank of the server calls it at once.

    Raises:
        RuntimeError: on all of them, where a node began with another draft than the first, or in another run folder.
    """
    group = get_parallel().tp_group.cpu_group
    name = [f".{uuid.uuid4().hex}"]
    is_first = dist.get_rank(group) == 0
    if is_first:
        (run.run_dir / name[0]).touch()
    dist.broadcast_object_list(name, src=dist.get_global_rank(group, 0), group=group)
    probe = run.run_dir / name[0]
    content = noted_content(run.version_path(run.draft_version))
    own = _Found(run.node, content, run.draft_version, run.run_dir, probe.exists())
    found: list[_Found | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    if is_first:
        probe.unlink()
    first, *others = found
    for other in others:
        if not other.shares_folder:
            raise RuntimeError(
                f"draft training: node {other.node} does not see in {other.run_dir} what node 0 writes to "
                f"{first.run_dir}; give all nodes the same --draft-training-run-dir, on storage that they share"
            )
        if (other.draft, other.version) != (first.draft, first.version):
            raise RuntimeError(
                f"draft training: node {other.node} begins with version {other.version} of the draft ({other.draft}), "
                f"node 0 with version {first.version} ({first.draft}); give them the same flags"
            )

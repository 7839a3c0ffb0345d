"""On the path of a server under test: a draft version whose config.json says so cannot be loaded by one rank."""

from sglang_specforge.checkpoint import load_config
from sglang_specforge.draft_bank import DraftBank

_load = DraftBank._load


def _load_unless_faulty(bank, version):
    import torch.distributed as dist

    if load_config(bank._run.version_path(version)).get("fails_on_rank") == dist.get_rank():
        bank.refuse(version, "no memory is left")
    else:
        _load(bank, version)


DraftBank._load = _load_unless_faulty

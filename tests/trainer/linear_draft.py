"""A draft of another kind, as a user would add it: no attention, one matrix for the state and one for the token."""

from typing import Any

from torch import Tensor, nn

from sglang_specforge.drafts import DraftKind, register
from trainer.draft import Draft, Past
from trainer.layers import RMSNorm


class LinearDraft(Draft):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        H = config["hidden_size"]
        self.fc = nn.Linear(3 * H, H, bias=False)
        self.token = nn.Linear(H, H, bias=False)
        self.norm = RMSNorm(H, config["rms_norm_eps"])
        self.lm_head = nn.Linear(H, config["draft_vocab_size"], bias=False)

    def start(self, aux_N3H: Tensor) -> Tensor:
        return self.fc(aux_N3H)

    def read(self, embed_NH: Tensor) -> Tensor:
        return self.token(embed_NH)

    def advance(self, read_NF: Tensor, state_NF: Tensor, positions_N: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        normed_NH, state_NF = self.norm.add(read_NF, state_NF)
        return normed_NH, state_NF


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    H, D = config["hidden_size"], config["draft_vocab_size"]
    return {"fc.weight": (H, 3 * H), "token.weight": (H, H), "norm.weight": (H,), "lm_head.weight": (D, H)}


LINEAR = register(DraftKind("LinearDraft", shapes, "tests.trainer.linear_draft:LinearDraft"))

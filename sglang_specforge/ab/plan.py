"""What an A/B compares, how long, and when it is settled."""

import secrets
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

Arm = Annotated[StrictInt, Field(ge=0, lt=2**53)] | Literal["active"]


class Plan(BaseModel):
    """Body of ``POST /draft/ab``. Arms are draft versions; the first is what the others are compared with."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    arms: Annotated[list[Arm], Field(min_length=2, max_length=8)]
    window_s: float = Field(5.0, ge=0.1, le=3600, description="Shortest turn of an arm, in seconds.")
    min_passes: int = Field(
        50, ge=1, le=1_000_000, description="Verifications of a request that a turn has to see; without load it waits."
    )
    smallest_difference: float = Field(
        0.02, gt=0, lt=1, description="Relative difference of acceptance lengths below which arms count as alike."
    )
    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="Probability of ever finding a difference between arms that are the same."
    )
    max_blocks: int = Field(200, ge=1, le=100_000, description="Turns of each arm after which it ends undecided.")
    seed: int = Field(
        default_factory=lambda: secrets.randbelow(2**31), ge=0, lt=2**31, description="Of the order within each block."
    )
    promote: StrictBool = Field(False, description="Activate the winner.")

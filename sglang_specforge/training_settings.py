"""What an operator can choose about a training step, wherever its data comes from, and what one training is about."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Dtype = Literal["bfloat16", "float32"]
Objective = Literal["soft_ce", "forward_kl", "hard_ce", "tv", "lk_alpha", "lk_lambda"]


def split(given: Any) -> Any:
    """A flag's comma-separated values, or the file's list as it is."""
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else given


def _split_weights(given: Any) -> Any:
    """A flag's ``name=weight,...``, or the file's table as it is."""
    if not isinstance(given, str):
        return given
    pairs = [part.partition("=") for part in given.split(",")]
    return {name.strip(): weight for name, _, weight in pairs}


def _check_weights(weights: dict[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of slice {name!r} is {weight}; it has to be above 0")
    return weights


class TrainingSettings(BaseModel):
    """Each field is a flag and a key of the settings file, for the server's trainer and for ``python -m trainer``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_dir: Path = Field(
        Path("draft-training"), description="Folder for checkpoints, published versions and the trainer's log."
    )
    trainer_device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Torch device of the trainer, for instance cuda:1 (of several processes, the first one's); auto: "
        "GPUs that nobody else uses, or else the CPU.",
    )
    trainer_threads: int = Field(1, ge=1, description="CPU threads of the trainer.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Compute type of training; auto follows the target. Weights are published as served."
    )
    batch_tokens: int = Field(2048, ge=8, description="Most tokens of one training step, over all processes.")
    micro_batch_tokens: int | None = Field(
        None, ge=8, description="Most tokens of one pass of one process; more are accumulated. Unset: no limit."
    )
    loss_on: Literal["generated", "all"] = Field(
        "generated", description="Tokens the loss is taken over: generated ones, or prompts too."
    )
    objective: Objective = Field(
        "soft_ce",
        description="Soft cross-entropy, its KL divergence, cross-entropy of the target's top token, total variation, "
        "or an LK loss (arXiv 2602.23881).",
    )
    lk_decay: float = Field(3.0, ge=0, description="Of lk_lambda: KL weighs exp(-lk_decay * acceptance rate).")
    rejection_weight: float = Field(
        0.0,
        ge=0,
        description="Extra weight of rows whose proposal the live target rejected (Aurora, arXiv 2602.06932).",
    )
    rejection_penalty: float = Field(
        0.0, ge=0, description="Weight of -log(1 - q) of the token that the live target rejected."
    )
    ttt_steps: int = Field(7, ge=1, le=16, description="Length of the training-time test (EAGLE-3, section 3.2).")
    ttt_decay: float = Field(0.8, gt=0, le=1, description="Weight of step k of the training-time test is decay**k.")
    ttt_weights: Annotated[tuple[float, ...] | None, BeforeValidator(split)] = Field(
        None, description="Weight of each step instead of ttt_decay, for instance 1,0.8,0.5."
    )
    slice_weights: Annotated[dict[str, float], BeforeValidator(_split_weights), AfterValidator(_check_weights)] = Field(
        {}, description="How often samples of a slice are drawn, for instance code=3,chat=0.5; others count 1."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for matrices; the head and vectors stay with AdamW."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    muon_learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of Muon.")
    schedule: Literal["constant", "cosine", "wsd"] = Field(
        "constant", description="After warm-up: constant, cosine to a tenth, or stable and then linear to zero."
    )
    schedule_steps: int | None = Field(
        None, ge=1, description="Steps after which cosine and wsd have come to their end; unset: all of an offline run."
    )
    wsd_decay_share: float = Field(0.2, gt=0, le=1, description="Share of schedule_steps in which wsd falls.")
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    grad_clip: float = Field(0.5, gt=0, description="Largest gradient norm.")
    activation_checkpointing: bool = Field(
        False, description="Compute each step's activations again in the backward pass instead of keeping them."
    )
    cpu_offload: bool = Field(False, description="Keep parameters and optimizer state in host memory.")
    compile: bool = Field(
        False, description="torch.compile what lies between matrix products: faster steps, after a minute's compiling."
    )
    keep_versions: int = Field(3, ge=2, description="Published versions kept on disk, the best one apart.")
    keep_checkpoints: int = Field(2, ge=1, description="Training checkpoints kept on disk.")
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(split)] = Field(
        (), description="Where metrics go besides <run_dir>/metrics.jsonl: tensorboard, wandb, or both."
    )
    seed: int = Field(0, description="Seed of a draft created here and of the trainer.")

    @property
    def step_weights(self) -> tuple[float, ...]:
        """Weight of each step of the training-time test."""
        return self.ttt_weights or tuple(self.ttt_decay**k for k in range(self.ttt_steps))

    @model_validator(mode="after")
    def _check_training(self) -> "TrainingSettings":
        if self.ttt_weights is not None and len(self.ttt_weights) != self.ttt_steps:
            raise ValueError(f"ttt_weights has {len(self.ttt_weights)} weights for ttt_steps = {self.ttt_steps}")
        return self


@dataclass(frozen=True)
class Speculation:
    """What a server drafts before each verification: a chain or, with ``topk`` above 1, a tree.

    Raises:
        ValueError: there are no such trees.
    """

    steps: int  # draft tokens one after another; SGLang's speculative_num_steps
    topk: int = 1  # branches of a step; SGLang's speculative_eagle_topk
    tokens: int | None = None  # rows of a verification of a tree; SGLang's speculative_num_draft_tokens

    @property
    def drafts(self) -> int:
        """Draft tokens that are verified together."""
        return (self.tokens or self.default_tokens(self.steps, self.topk)) - 1

    def __post_init__(self) -> None:
        most = self.topk + (self.steps - 1) * self.topk**2
        if self.topk > 1 and not 1 <= self.drafts <= most:
            raise ValueError(
                f"{self.tokens} tokens of {self.steps} steps of top-{self.topk}; such a tree has 2 to {1 + most}"
            )

    @staticmethod
    def default_tokens(steps: int, topk: int) -> int:
        """Rows of a verification where none are asked for."""
        return 1 + steps if topk == 1 else min(1 + steps * topk, 16)


class Job(BaseModel):
    """What is trained, for which target, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: TrainingSettings
    target_path: str = Field(description="Local folder of the target.")
    target_fingerprint: str
    draft_path: str = Field(description="Checkpoint that training starts from, version 0.")
    served_dtype: Dtype
    speculation: Speculation
    overrides: dict[str, Any] = Field({}, description="SGLang's --json-model-override-args.")

    @property
    def run_dir(self) -> Path:
        return self.settings.run_dir.absolute()

    @property
    def training_dtype(self) -> Dtype:
        return self.served_dtype if self.settings.dtype == "auto" else self.settings.dtype

    def version_path(self, version: int) -> Path:
        """Folder of a published version; version 0 is the draft that training started from."""
        from sglang_specforge.versions import VersionFolder  # imports torch, which a command has no second for

        return VersionFolder(self.run_dir).path(version) if version else Path(self.draft_path)

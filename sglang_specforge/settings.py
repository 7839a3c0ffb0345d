"""What an operator can choose about draft training: one model behind the flags, the file and the documentation.

The launcher parses it once; every spawned process and the trainer read the same JSON document from the
environment variable ``SGLANG_SPECFORGE_RUN`` (``Run``), because SGLang's ``ServerArgs`` takes no new fields.
"""

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sglang_specforge.versions import VersionFolder

RUN_VARIABLE = "SGLANG_SPECFORGE_RUN"
Dtype = Literal["bfloat16", "float32"]


class SettingsError(ValueError):
    """A setting is unknown, out of bounds, or contradicts another; the message says what is accepted."""


class DraftTrainingSettings(BaseModel):
    """Each field is the flag ``--draft-training-<name>`` and the key ``<name>`` of the settings file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_dir: Path = Field(
        Path("draft-training"), description="Folder for checkpoints, published versions and the trainer's log."
    )
    trainer: Literal["spawn", "none"] = Field(
        "spawn", description="spawn: the server starts and supervises the trainer. none: capture only."
    )
    trainer_device: str = Field(
        "cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="Torch device of the trainer, for instance cuda:1."
    )
    trainer_threads: int = Field(1, ge=1, description="CPU threads of the trainer.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Compute type of training; auto follows the target. Weights are published as served."
    )
    ring_mb: int = Field(256, ge=1, description="Host memory for captured states on their way to the trainer, in MiB.")
    max_sample_tokens: int = Field(2048, ge=8, description="Longest sample; the rest of a longer request is dropped.")
    batch_tokens: int = Field(2048, ge=8, description="Most tokens of one training step.")
    replay_tokens: int = Field(262_144, ge=8, description="Tokens the trainer keeps to train on again.")
    epochs_per_token: float = Field(4.0, gt=0, description="How often, on average, a captured token is trained on.")
    holdout_every: int = Field(20, ge=2, description="One sample in so many is held out for evaluation.")
    loss_on: Literal["generated", "all"] = Field(
        "generated", description="Tokens the loss is taken over: generated ones, or prompts too."
    )
    ttt_steps: int = Field(7, ge=1, le=16, description="Length of the training-time test (EAGLE-3, section 3.2).")
    ttt_decay: float = Field(0.8, gt=0, le=1, description="Weight of step k of the training-time test is decay**k.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    grad_clip: float = Field(0.5, gt=0, description="Largest gradient norm.")
    publish_every_s: float = Field(60.0, gt=0, description="Shortest time between two published versions, in seconds.")
    keep_versions: int = Field(3, ge=2, description="Published versions kept on disk.")
    draft_vocab_size: int = Field(32_000, ge=8, description="Largest draft vocabulary of a draft created here.")
    seed: int = Field(0, description="Seed of a draft created here and of the trainer.")

    @model_validator(mode="after")
    def _check_together(self) -> "DraftTrainingSettings":
        if self.replay_tokens < self.batch_tokens:
            raise ValueError(
                f"replay_tokens = {self.replay_tokens} holds no batch; give at least batch_tokens = {self.batch_tokens}"
            )
        return self


class Run(BaseModel):
    """One server run: the settings and everything the launcher decided from them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: DraftTrainingSettings
    target_path: str = Field(description="Local folder of the target.")
    target_fingerprint: str
    draft_path: str = Field(description="Checkpoint that the server starts with, version 0.")
    served_dtype: Dtype
    draft_steps: int = Field(description="Tokens that the server drafts in a chain before each verification.")
    spans_endpoint: str = Field(description="ZMQ endpoint that the trainer binds for captured spans.")
    control_endpoint: str = Field(description="ZMQ endpoint that the server binds for the trainer's messages.")

    @property
    def run_dir(self) -> Path:
        return self.settings.run_dir.absolute()

    @property
    def training_dtype(self) -> Dtype:
        return self.served_dtype if self.settings.dtype == "auto" else self.settings.dtype

    def version_path(self, version: int) -> Path:
        """Folder of a published version; version 0 is the draft the server started with."""
        return VersionFolder(self.run_dir).path(version) if version else Path(self.draft_path)

    def export(self) -> None:
        """Hand this run to every process started from here on."""
        os.environ[RUN_VARIABLE] = self.model_dump_json()

    @classmethod
    def inherited(cls) -> "Run | None":
        """The run that an ancestor exported, or None where draft training is off."""
        document = os.environ.get(RUN_VARIABLE)
        return cls.model_validate_json(document) if document else None


def load_settings(given: dict[str, Any], file: Path | None = None) -> DraftTrainingSettings:
    """Settings from a TOML or YAML ``file``, overridden by what was ``given`` as flags.

    Raises:
        SettingsError: naming each unknown or unacceptable value and what is accepted.
    """
    values = {**(_read_file(file) if file else {}), **given}
    try:
        return DraftTrainingSettings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(item) for item in error.errors())) from error


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"draft training settings file {file}: {error.strerror}") from error
    try:
        values = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text) or {}
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"draft training settings file {file} is neither TOML nor YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"draft training settings file {file}: expected keys and values, found {values!r}")
    return values


def _explain(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if not name:
        return f"draft training settings contradict each other: {error['msg']}"
    if error["type"] == "extra_forbidden":
        known = ", ".join(DraftTrainingSettings.model_fields)
        return f"draft training setting {name!r} is unknown; accepted are: {known}"
    return f"draft training setting {name!r} = {error['input']!r} is not accepted: {error['msg']}"

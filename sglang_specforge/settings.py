"""What an operator can choose about draft training: one model behind the flags, the file and the documentation.

The launcher parses it once; every spawned process and the trainer read the same JSON document from the
environment variable ``SGLANG_SPECFORGE_RUN`` (``Run``), because SGLang's ``ServerArgs`` takes no new fields.
"""

import os
import secrets
import shutil
import tempfile
import tomllib
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from sglang_specforge.contracts.spans import Travel
from sglang_specforge.engine_address import EngineAddress
from sglang_specforge.manifest import Drafting, Mode
from sglang_specforge.training_settings import Job, TrainingSettings, split

RUN_VARIABLE = "SGLANG_SPECFORGE_RUN"
SERVER_PID_VARIABLE = "SGLANG_SPECFORGE_SERVER_PID"  # of the server that started a trainer
BankPlace = Literal["device", "host"]
_MOST_RING_MB = 8192  # of a ring whose size nobody gave
Settings = TypeVar("Settings", bound=TrainingSettings)


class SettingsError(ValueError):
    """A setting is unknown, out of bounds, or contradicts another; the message says what is accepted."""


def check_run_folder(settings: TrainingSettings) -> None:
    """It is made where it is not there.

    Raises:
        SettingsError: no file can be made in it.
    """
    _try_folder("run_dir", settings.run_dir, make=True)


def check_machine(settings: TrainingSettings, processes: int) -> None:
    """``processes``: of the trainer on this machine.

    Raises:
        SettingsError: this machine lacks a GPU that is asked for or that ``cpu_offload`` is about, or the compiler that
            ``compile`` needs.
    """
    compiler = os.environ.get("CXX", "g++")  # the one that torch's own code generator calls
    if settings.compile and not shutil.which(compiler):
        raise SettingsError(
            f"draft training setting 'compile' = True needs the compiler {compiler}, which is not there; install it, "
            "name another in CXX, or leave compile out"
        )
    kind, _, index = settings.trainer_device.partition(":")
    if kind != "cuda":
        if settings.cpu_offload:
            raise SettingsError("draft training setting 'cpu_offload' is for a trainer on a GPU, not the CPU")
        return
    from torch import cuda

    needed, there = int(index or 0) + processes, cuda.device_count()
    if needed > there:
        raise SettingsError(
            f"draft training setting 'trainer_device' = {settings.trainer_device!r}, for {processes} process(es), "
            f"needs {needed} GPU(s), and torch finds {there} here; give cpu, or one that is there"
        )


def _try_folder(setting: str, folder: Path, make: bool = False) -> None:
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SettingsError(
            f"draft training setting {setting!r} = {str(folder)!r}: no file can be made there ({error.strerror}); "
            "give a folder that can be written to"
        ) from error


class OnlineSettings(TrainingSettings):
    """Training on what live servers compute."""

    max_sample_tokens: int = Field(2048, ge=8, description="Longest sample; the rest of a longer request is dropped.")
    prefix_store_mb: int = Field(
        512, ge=0, description="Memory of the trainer for states of prefixes that the server caches, in MiB; 0: none."
    )
    prefix_spill_dir: Path | None = Field(
        None, description="Folder for what that memory has no room for, in a file without a name. Default: forgotten."
    )
    prefix_spill_mb: int = Field(8192, ge=1, description="Most MiB of it.")
    replay_tokens: int = Field(262_144, ge=8, description="Tokens the trainer keeps to train on again.")
    replay_policy: Literal["newest", "reservoir"] = Field(
        "newest", description="Which samples stay when there are too many: the newest, or a thinning share of all."
    )
    drift_weight: float = Field(
        4.0, ge=1, description="How often samples that came after a fall of acceptance are drawn, against those before."
    )
    epochs_per_token: float = Field(4.0, gt=0, description="How often, on average, a captured token is trained on.")
    holdout_every: int = Field(
        20, ge=2, description="About one sequence in so many is held out for evaluation, by its content."
    )
    evaluated_samples: int = Field(32, ge=1, description="Newest held-out samples that each version is evaluated on.")
    draft_vocab_gain: float = Field(
        0.01,
        gt=0,
        le=1,
        description="How much more of the tokens that are trained on another draft vocabulary of the same size has to "
        "hold, as a share, for the draft to change to it; 1: never.",
    )
    gate_confidence: float = Field(
        0.95, gt=0.5, lt=1, description="Of a new version's gain over the draft in service, before it goes live."
    )
    gate_slice_loss: float = Field(
        0.05, ge=0, description="Most that a slice may lose of its acceptance length, as a share, before it does."
    )
    take_up_loss: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Where three new versions in succession are worse than the draft in service, as surely as the gate "
        "asks for a gain, by this share of its acceptance length or more, training goes on from that draft; 1: never.",
    )
    publish_every_s: float = Field(60.0, gt=0, description="Shortest time between two published versions, in seconds.")

    @model_validator(mode="after")
    def _check_together(self) -> "OnlineSettings":
        if self.replay_tokens < self.batch_tokens:
            raise ValueError(
                f"replay_tokens = {self.replay_tokens} holds no batch; give at least batch_tokens = {self.batch_tokens}"
            )
        if self.prefix_spill_dir and not self.prefix_store_mb:
            raise ValueError("prefix_spill_dir takes what prefix_store_mb has no room for, and prefix_store_mb = 0")
        return self

    def check_spill(self) -> None:
        """On the trainer's machine.

        Raises:
            SettingsError: no file can be made in the folder for spilled prefixes.
        """
        if self.prefix_spill_dir:
            _try_folder("prefix_spill_dir", self.prefix_spill_dir)


class DraftTrainingSettings(OnlineSettings):
    """What one server does. A field is the flag ``--draft-training-<name>``."""

    trainer: Literal["spawn", "none"] = Field(
        "spawn",
        description="spawn: the server starts and supervises the trainer. none: it waits for a reader of its stream, "
        "such as python -m trainer attach.",
    )
    trainer_processes: int = Field(1, ge=1, description="Processes of the trainer; with CUDA, one on each GPU.")
    trainer_niceness: int = Field(
        10,
        ge=0,
        le=19,
        description="Niceness of the trainer's processes: where cores are scarce, the server goes first.",
    )
    ring_mb: int | None = Field(
        None,
        ge=1,
        description="Host memory of each exporting rank for captured states on their way to the trainer, in MiB. "
        "Unset: room for four of the longest prefill passes, 256 to 8192.",
    )
    capture_sample: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the requests to capture, each of them whole.",
        json_schema_extra={"flag": "draft-capture-sample"},
    )
    capture_opt_in: bool = Field(
        False,
        description="Capture only requests that say true: custom_params draft_training, or header X-Draft-Training.",
        json_schema_extra={"flag": "draft-capture-opt-in"},
    )
    capture_deny: Annotated[tuple[str, ...], BeforeValidator(split)] = Field(
        (),
        description="Slices that are never captured, for instance internal,medical: what requests are labelled with, "
        "by custom_params draft_slice or header X-Draft-Slice.",
        json_schema_extra={"flag": "draft-capture-deny"},
    )
    capture_max_mb_s: float | None = Field(
        None,
        gt=0,
        description="Most MiB a second to capture, on each exporting rank; above it, fewer requests are captured.",
        json_schema_extra={"flag": "draft-capture-max-mb-s"},
    )
    capture_dtype: Travel = Field(
        "served",
        description="How states go to the trainer: as the target is served, or in fewer bytes. float8 has a scale for "
        "each token.",
        json_schema_extra={"flag": "draft-capture-dtype"},
    )
    pull: EngineAddress | None = Field(
        None,
        description="Where a Mooncake transfer engine lets trainers on other machines pull states from: "
        "rdma://HOST/DEVICE (or tcp://HOST), HOST this machine's address. Not encrypted: for trusted networks.",
    )
    draft_vocab_size: int = Field(32_000, ge=8, description="Largest draft vocabulary of a draft created here.")
    bank_slots: int = Field(
        3,
        ge=2,
        description="Draft versions that stay in memory on each rank, the active one among them.",
        json_schema_extra={"flag": "draft-bank-slots"},
    )
    bank_on: BankPlace = Field(
        "device",
        description="Where they stay: in the device's memory, or in pinned memory of the host, from which a swap takes "
        "longer.",
        json_schema_extra={"flag": "draft-bank-on"},
    )
    bank_load_max_mb_s: float | None = Field(
        None,
        gt=0,
        description="Most MiB a second that are put there of a version, a tensor at a time, on each rank.",
        json_schema_extra={"flag": "draft-bank-load-max-mb-s"},
    )
    gate: Mode = Field(
        "auto",
        description="Of new versions. auto: those that are better on held-out samples go live, and are taken back "
        "where live acceptance falls. propose: they wait for POST /draft/activate. off: all go live.",
        json_schema_extra={"flag": "draft-gate"},
    )
    drafting: Drafting = Field(
        "auto",
        description="auto: steps draft only while that makes answers faster, which is tried now and then. always: "
        "every step drafts. never: none does. Some of SGLang's features need always, and have it by default.",
        json_schema_extra={"flag": "draft-drafting"},
    )

    @model_validator(mode="after")
    def _check_pull(self) -> "DraftTrainingSettings":
        if self.pull and self.trainer == "spawn":
            raise ValueError(f"pull = {self.pull} is for trainers on other machines; give trainer none as well")
        return self

    def with_absolute_folders(self) -> "DraftTrainingSettings":
        spill = self.prefix_spill_dir and self.prefix_spill_dir.absolute()
        return self.model_copy(update={"run_dir": self.run_dir.absolute(), "prefix_spill_dir": spill})


class Run(Job):
    """One server run: the settings and everything the launcher decided from them."""

    settings: DraftTrainingSettings
    draft_version: int = Field(0, description="Number of the version at draft_path, where it is one of the run folder.")
    spans_endpoint: str = Field(description="ZMQ endpoint that the trainer binds for captured spans.")
    control_endpoint: str = Field(description="ZMQ endpoint that the server binds for the trainer's messages.")
    disaggregation: Literal["null", "prefill", "decode"] = Field("null", description="SGLang's --disaggregation-mode.")
    nodes: int = Field(1, ge=1, description="SGLang's --nnodes.")
    node: int = Field(0, ge=0, description="SGLang's --node-rank: the first has the trainer and the control service.")
    replicas: int = Field(1, ge=1, description="SGLang's --dp-size, or --attn-dp-size.")
    salt: str = Field(default_factory=lambda: secrets.token_hex(16), description="Of request ids in the stream.")

    @property
    def is_spread(self) -> bool:
        """Whether several nodes compute requests and export them."""
        return self.nodes > 1 and self.replicas > 1

    @property
    def socket_folder(self) -> Path:
        return Path(self.spans_endpoint.removeprefix("ipc://")).parent

    @property
    def way_file(self) -> Path:
        """Where exporters find a reader on another machine (``reader.Way``); its folder is seen by all of them."""
        return (self.run_dir if self.is_spread else self.socket_folder) / "reader.json"

    @property
    def travel_dtype(self) -> str:
        """Of states on their way, as ``contracts.spans.TensorLayout`` names it."""
        return self.served_dtype if self.settings.capture_dtype == "served" else self.settings.capture_dtype

    @property
    def most_ring_bytes(self) -> int:
        """What the ring has, or at most where nobody gave its size."""
        return (self.settings.ring_mb or _MOST_RING_MB) << 20

    def alias(self, rid: str) -> str:
        """What a request is called in the stream: ids are often made of what a user should keep."""
        return blake2b(rid.encode("utf-8", "surrogatepass"), key=bytes.fromhex(self.salt), digest_size=16).hexdigest()

    def export(self) -> None:
        """Hand this run to every process started from here on."""
        os.environ[RUN_VARIABLE] = self.model_dump_json()

    @classmethod
    def inherited(cls) -> "Run | None":
        """The run that an ancestor exported, or None where draft training is off."""
        document = os.environ.get(RUN_VARIABLE)
        return cls.model_validate_json(document) if document else None


def load_settings(model: type[Settings], given: dict[str, Any], file: Path | None = None) -> Settings:
    """Settings from a TOML or YAML ``file``, overridden by what was ``given`` as flags.

    Raises:
        SettingsError: naming each unknown or unacceptable value and what is accepted.
    """
    values = {**(_read_file(file) if file else {}), **given}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(model, item) for item in error.errors())) from error


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


def _explain(model: type[TrainingSettings], error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if not name:
        return f"draft training settings contradict each other: {error['msg']}"
    if error["type"] == "extra_forbidden":
        return f"draft training setting {name!r} is unknown; accepted are: {', '.join(model.model_fields)}"
    if error["type"] == "missing":
        return f"draft training setting {name!r} is missing: {model.model_fields[name].description}"
    return f"draft training setting {name!r} = {error['input']!r} is not accepted: {error['msg']}"

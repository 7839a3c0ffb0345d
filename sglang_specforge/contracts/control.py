"""Small messages from the trainer to the server (msgpack over ZMQ PUSH/PULL)."""

import msgspec


class TokenLedger(msgspec.Struct, kw_only=True):
    """Where the captured tokens went. received = trained + held_out + buffered + dropped, at any time."""

    streams: dict[str, int] = {}  # tokens by exporter: those that came, and those known to be lost on the way
    trained: int = 0
    held_out: int = 0
    buffered: int = 0
    dropped: dict[str, int] = {}

    @property
    def received(self) -> int:
        return sum(self.streams.values())

    def drop(self, reason: str, tokens: int) -> None:
        if tokens:
            self.dropped[reason] = self.dropped.get(reason, 0) + tokens


class Parity(msgspec.Struct, kw_only=True):
    """Step-0 top-1 tokens that the served weights give in the trainer, against those the live worker proposed."""

    compared: int = 0
    agreed: int = 0


class Staleness(msgspec.Struct, kw_only=True):
    """How old the samples of the last step were, in seconds since they came, and how many are kept."""

    mean_age_s: float = 0.0
    oldest_age_s: float = 0.0
    buffered_samples: int = 0


class PrefixCounts(msgspec.Struct, kw_only=True):
    """What the trainer's prefix store did for samples that begin after a prefix the server had cached."""

    prefixes: int = 0  # such samples
    whole_prefixes: int = 0  # of those, the ones that were completed from position 0
    restored_tokens: int = 0  # positions that got their states back
    missing_tokens: int = 0  # positions that did not: the sample is trained on without them
    stored_bytes: int = 0  # in memory
    spilled_bytes: int = 0  # on disk
    evicted_blocks: int = 0  # forgotten
    unspilled_blocks: int = 0  # of those, the ones that the disk did not take or give back


class Vocabulary(msgspec.Struct, kw_only=True):
    """The draft's, against the tokens that the trainer keeps to train on, as of the newest version."""

    tokens: int = 0
    counted: int = 0  # of those that are trained on
    coverage: float | None = None  # share of them that the draft can say
    chosen: int = 0  # times that it was chosen anew, for the next version


class Heartbeat(msgspec.Struct, tag="heartbeat", kw_only=True):
    """What the trainer is doing."""

    pid: int | None = None
    state: str = "starting"  # then waiting or training
    step: int = 0
    version: int = 0  # newest published one of the run folder
    loss: float | None = None  # of the last step; None: it was not finite
    skipped_steps: int = 0  # that changed nothing, as their gradients were not finite
    taken_up: int = 0  # times that training went on from the draft in service, as its own was worse
    held_out_acceptance_length: float | None = None  # predicted from held-out samples, greedy chain
    ledger: TokenLedger = msgspec.field(default_factory=TokenLedger)
    parity: Parity = msgspec.field(default_factory=Parity)
    prefixes: PrefixCounts = msgspec.field(default_factory=PrefixCounts)
    staleness: Staleness = msgspec.field(default_factory=Staleness)
    vocabulary: Vocabulary = msgspec.field(default_factory=Vocabulary)
    malformed_messages: int = 0
    resumed_from_step: int = 0


class Verdict(msgspec.Struct, kw_only=True):
    """Of the gate: a candidate against the draft in service, on held-out samples."""

    samples: int
    gain: float | None = None  # tokens a verification
    low: float | None = None  # lower confidence bound of the gain
    served: float | None = None  # acceptance length of the draft in service there
    slices: dict[str, float] = {}  # relative gain of each
    against: str | None = None  # SHA-256 of the weights of the draft in service, as it was when that was judged
    passed: bool
    why: str

    @property
    def least_loss(self) -> float:
        """Share of the served draft's acceptance length that is lost, by the upper bound of the gain, which is as far
        from it as the lower one; 0 where it may be a gain."""
        return 0.0 if self.gain is None else max(0.0, (self.low - 2 * self.gain) / self.served)


class VersionReady(msgspec.Struct, tag="version_ready", kw_only=True):
    """A checkpoint to serve next: a version in the server's own run folder, or one to be copied there."""

    path: str
    verdict: Verdict | None = None  # None: it was not compared


ControlMessage = Heartbeat | VersionReady
_decoder = msgspec.msgpack.Decoder(ControlMessage)


def encode(message: ControlMessage) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> ControlMessage:
    """Raises msgspec.MsgspecError for anything else."""
    return _decoder.decode(data)

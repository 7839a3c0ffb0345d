"""The one who reads a server's streams from another machine: who it is, for how long, and how the exporters know.

It asks over HTTP, saying where it listens, and goes on asking: a lease that is not renewed runs out. SGLang carries
only numbers to its schedulers, so where to send is in a file that only their user can read (``Run.way_file``).
"""

import os
import time
from pathlib import Path

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from sglang_specforge.curve import Endpoint, Identity, Key

LEASE_S = 20.0


class Reader(BaseModel):
    """Body of ``POST /draft/reader``: where a trainer on another machine listens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spans_endpoint: Endpoint = Field(description="tcp://HOST:PORT that captured states are sent to.")
    control_endpoint: Endpoint = Field(description="tcp://HOST:PORT that the trainer's messages are fetched from.")
    key: Key = Field(description="Its public key of CURVE, in Z85.")


class ReaderHeld(RuntimeError):
    """Somebody else reads the server's streams; the message says who."""


class Way(msgspec.Struct):
    """For exporters: whom to send to, and as whom."""

    endpoint: str
    peer: str
    own: Identity


class Lease:
    """Of a server's streams, for readers on other machines. ``own`` are the keys of this life of the server; exporters
    find the reader in ``way_file`` (``Run.way_file``)."""

    def __init__(self, way_file: Path) -> None:
        self.own, self.reader = Identity.new(), None
        self._file, self._renewed_s = way_file, 0.0

    def take(self, reader: Reader) -> bool:
        """Whether it is a new one. Raises ReaderHeld."""
        if self.reader is not None and not self.has_run_out() and self.reader.key != reader.key:
            raise ReaderHeld(
                f"the trainer at {self.reader.spans_endpoint} reads the states of this server; end it, or wait "
                f"{LEASE_S:.0f} s after its last word"
            )
        if is_new := reader != self.reader:
            self._write(Way(reader.spans_endpoint, reader.key, self.own))
        self.reader, self._renewed_s = reader, time.monotonic()
        return is_new

    def has_run_out(self) -> bool:
        return self.reader is not None and time.monotonic() - self._renewed_s > LEASE_S

    def end(self) -> None:
        self.reader = None
        self._file.unlink(missing_ok=True)

    def _write(self, way: Way) -> None:
        part = self._file.with_suffix(".part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(way))
        part.replace(self._file)


def load_way(way_file: Path) -> Way:
    """Raises OSError where there is none."""
    return msgspec.json.decode(way_file.read_bytes(), type=Way)

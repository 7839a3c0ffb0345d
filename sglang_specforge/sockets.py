"""A run's Unix sockets: in a folder short of path that is the owner's alone, and each with one reader."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

_PREFIX = "specforge-"


def make_socket_folder() -> Path:
    """A new folder of mode 0700 for this process's run; folders of processes that are no more are removed.

    SGLang ends by killing its process tree, so that no run can be trusted to clean up after itself. A Unix socket's
    path has to stay under 108 bytes, so the folder is not in the run folder.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))


class EndpointTaken(RuntimeError):
    """Another process reads this stream; the message says what to do."""


def lock_endpoint(endpoint: str) -> IO[str]:
    """Hold an ``ipc://`` endpoint for as long as the returned file is open.

    ZMQ would let a second process bind it and take the stream away in silence. Raises EndpointTaken.
    """
    lock = open(endpoint.removeprefix("ipc://") + ".lock", "w")  # noqa: SIM115 - the caller holds it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise EndpointTaken(
            f"another process reads the states of this server ({endpoint}); start the server with "
            "--draft-training-trainer none, or wait for the other to end"
        ) from error
    return lock


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

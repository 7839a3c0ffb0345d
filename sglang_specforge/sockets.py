"""The folder of a run's Unix sockets, short of path, readable by its owner alone, and gone some time after its run."""

import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "specforge-"


def make_socket_folder() -> Path:
    """A new folder of mode 0700 for this process's run; folders of processes that are no more are removed.

    SGLang ends by killing its process tree, so that no run can be trusted to clean up after itself. A Unix socket's
    path has to stay under 108 bytes, so the folder is not in the run folder.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

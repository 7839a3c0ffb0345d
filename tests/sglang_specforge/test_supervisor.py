import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sglang_specforge import supervisor

SAVES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))"
HANGS = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.fixture
def supervised(monkeypatch):
    """A supervisor whose trainer is one line of a program, that says when it is ready."""

    def supervise(line):
        command = [sys.executable, "-c", f"import signal, sys, time; {line}; print(flush=True); time.sleep(600)"]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        children[-1].stdout.readline()
        monkeypatch.setattr(supervisor.TrainerSupervisor, "_spawn", lambda self: children[-1])
        run = SimpleNamespace(settings=SimpleNamespace(trainer_device="cpu"))
        return supervisor.TrainerSupervisor(run)

    children = []
    yield supervise
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


async def end(supervised):
    keeping = asyncio.create_task(supervised.keep_alive())
    await asyncio.sleep(0)
    assert supervised.status()["alive"]
    supervised.end()
    alive = supervised.status()["alive"]
    if not alive:
        await keeping  # it ends by itself: nothing is started again
    keeping.cancel()
    return alive


def test_a_server_that_ends_waits_until_its_trainer_has_saved_and_starts_no_other(supervised, caplog):
    assert not asyncio.run(end(supervised(SAVES)))
    assert not caplog.records


def test_a_trainer_that_hangs_holds_up_the_servers_end_for_a_limited_time(supervised, caplog, monkeypatch):
    monkeypatch.setattr(supervisor, "_SAVE_LIMIT_S", 0.2)
    assert asyncio.run(end(supervised(HANGS)))
    assert "what it learnt since its last checkpoint is lost" in caplog.text

"""Socket folders are private, and those of dead runs go away."""

import subprocess
import sys

from sglang_specforge import sockets


def test_folders_of_dead_processes_are_removed_and_those_of_the_living_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(sockets.tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"specforge-{dead.pid}-x").mkdir()
    (tmp_path / "specforge-notes").mkdir()
    living = sockets.make_socket_folder()
    assert living.stat().st_mode & 0o777 == 0o700
    again = sockets.make_socket_folder()
    assert {p.name for p in tmp_path.iterdir()} == {living.name, again.name, "specforge-notes"}

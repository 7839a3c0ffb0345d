"""What is brought to a server on another machine when the way is slower than the training."""

import pytest

from sglang_specforge.contracts.control import Verdict, VersionReady
from sglang_specforge.versions import VersionFolder
from trainer import far as module
from trainer.far import Far


def ready(name, passed):
    return VersionReady(path=name, verdict=Verdict(samples=1, passed=passed, why=""))


@pytest.mark.parametrize(
    ("waiting", "brought"),
    [
        ([ready("1", True), ready("2", True), ready("3", True)], ["1", "3"]),
        ([ready("1", True), ready("2", True), ready("3", False)], ["1", "2"]),
        ([ready("1", True), ready("2", False), ready("3", False)], ["1", "3"]),
        ([ready("1", False), ready("2", False), VersionReady(path="3")], ["1", "3"]),
    ],
)
def test_the_newest_that_passed_is_brought_and_those_before_it_are_not(monkeypatch, tmp_path, waiting, brought):
    far = Far("http://a", None, "127.0.0.1", 9, "key", VersionFolder(tmp_path))
    asked = []

    def upload(url, api_key, checkpoint):
        if not asked:  # the others come while the first is on its way
            for message in waiting[1:]:
                far.bring(message)
        asked.append(checkpoint.name)
        if len(asked) == 2:
            far._to_bring.put(None)
        return f"/server/{checkpoint.name}"

    monkeypatch.setattr(module, "upload_checkpoint", upload)
    far.is_leased = True
    far.bring(waiting[0])
    far._bring()
    assert asked == brought
    assert [message.path for message in far.brought()] == [f"/server/{name}" for name in brought]


def test_a_version_that_does_not_get_there_is_left_out_and_the_next_one_goes(monkeypatch, tmp_path):
    far = Far("http://a", None, "127.0.0.1", 9, "key", VersionFolder(tmp_path))

    def upload(url, api_key, checkpoint):
        if checkpoint.name == "1":
            far.bring(ready("2", True))
            raise FileNotFoundError("1/config.json")
        far._to_bring.put(None)
        return checkpoint.name

    monkeypatch.setattr(module, "upload_checkpoint", upload)
    far.is_leased = True
    far.bring(ready("1", True))
    far._bring()
    assert [message.path for message in far.brought()] == ["2"]

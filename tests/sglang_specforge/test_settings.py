"""Settings: flags over file over defaults, and an error that says what is accepted."""

import pytest

from sglang_specforge.settings import DraftTrainingSettings, Run, SettingsError, check_machine, load_settings
from tests.tiny import make_run, make_target


@pytest.mark.parametrize(
    ("name", "text"),
    [("s.toml", "ttt_steps = 5\nlearning_rate = 0.5\n"), ("s.yaml", "ttt_steps: 5\nlearning_rate: 0.5\n")],
)
def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    settings = load_settings(DraftTrainingSettings, {"ttt_steps": "3"}, tmp_path / name)
    assert (settings.ttt_steps, settings.learning_rate) == (3, 0.5)
    assert settings.grad_clip == DraftTrainingSettings().grad_clip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ttt_stepz": 3}, "'ttt_stepz' is unknown; accepted are: run_dir"),
        ({"ttt_steps": "many"}, "'ttt_steps' = 'many' is not accepted"),
        ({"ttt_steps": 0}, "'ttt_steps' = 0 is not accepted"),
        ({"trainer_device": "gpu1"}, "'trainer_device' = 'gpu1' is not accepted"),
        ({"trainer": "remote"}, "'trainer' = 'remote' is not accepted"),
        ({"batch_tokens": 2048, "replay_tokens": 100}, "replay_tokens = 100 holds no batch"),
        ({"pull": "rdma://10.0.0.1"}, "is for trainers on other machines"),
        ({"pull": "10.0.0.1", "trainer": "none"}, "'pull' = '10.0.0.1' is not accepted: .*rdma://HOST/DEVICE"),
        ({"capture_dtype": "int4"}, "'capture_dtype' = 'int4' is not accepted"),
        ({"prefix_store_mb": 0, "prefix_spill_dir": "."}, "and prefix_store_mb = 0"),
    ],
)
def test_what_is_not_accepted_is_named(given, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(DraftTrainingSettings, given)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.toml"):
        load_settings(DraftTrainingSettings, {}, tmp_path / "nowhere.toml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(SettingsError, match="expected keys and values"):
        load_settings(DraftTrainingSettings, {}, tmp_path / "list.yaml")


def test_a_run_reaches_spawned_processes_whole(tmp_path, monkeypatch):
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    monkeypatch.delenv("SGLANG_SPECFORGE_RUN", raising=False)
    assert Run.inherited() is None
    monkeypatch.setenv("SGLANG_SPECFORGE_RUN", "")
    run.export()
    assert Run.inherited() == run


def test_a_requests_alias_is_the_same_for_whoever_knows_the_run_and_tells_nobody_its_id(tmp_path):
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    other = Run(**{name: getattr(run, name) for name in Run.model_fields if name != "salt"})
    told = Run.model_validate_json(run.model_dump_json())
    assert told.alias("alice-1") == run.alias("alice-1") != other.alias("alice-1")
    assert run.alias("alice-1") != run.alias("alice-2")
    assert "alice" not in run.alias("alice-1")


def test_compiling_without_a_compiler_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_machine(DraftTrainingSettings(), 1)
    with pytest.raises(SettingsError, match="needs the compiler no-such-compiler, which is not there"):
        check_machine(DraftTrainingSettings(compile=True), 1)

"""The launcher's flags: through SGLang's own entry in a process of its own, and bad ones through its parser."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from sglang.srt.server_args import ServerArgs

from server_patches.common import flags
from sglang_specforge.checkpoint import CONTENT_KEY, load_config
from sglang_specforge.new_draft import init_draft
from sglang_specforge.settings import RUN_VARIABLE, DraftTrainingSettings, Run, load_settings
from sglang_specforge.settings_flags import flag_of, given_settings
from sglang_specforge.target import fingerprint_target
from tests.tiny import make_target

SCRIPT = """
import json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry.apply_hooks()
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(sys.argv[1:])
fields = {name: repr(value) for name, value in args.resolved_dict().items()}
print("ANSWER" + json.dumps([fields, os.environ.get("SGLANG_SPECFORGE_RUN")]))
"""


def parse(*arguments, plugins="specforge", environment=None):
    command = [sys.executable, "-c", SCRIPT, "--device", "cpu", "--port", "30000", "--random-seed", "1", *arguments]
    environment = {"SGLANG_PLUGINS": plugins, "SGLANG_USE_CPU_ENGINE": "1", **(environment or {})}
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=180)


def answer(result):
    line = next((line for line in result.stdout.splitlines() if line.startswith("ANSWER")), None)
    assert line, result.stdout + result.stderr
    return json.loads(line.removeprefix("ANSWER"))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(autouse=True)
def cpu_engine(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")


@pytest.fixture(scope="module")
def parser():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flags.add_flags(None, parser)
    return parser


def test_without_the_flag_nothing_changes(target):
    with_plugin = answer(parse("--model-path", str(target)))
    assert with_plugin == answer(parse("--model-path", str(target), plugins="specforge_cpu_kernels"))
    assert with_plugin[1] is None
    assert with_plugin[0]["speculative_algorithm"] == "None"


def test_the_flag_makes_a_draft_and_sets_speculation(target, tmp_path):
    run_dir = tmp_path / "run"
    fields, run = answer(
        parse(
            "--model-path",
            str(target),
            "--dtype",
            "bfloat16",
            "--enable-draft-training",
            "--draft-training-run-dir",
            str(run_dir),
        )  # fmt: skip
    )
    assert fields["speculative_algorithm"] == "'EAGLE3'"
    assert (fields["speculative_num_steps"], fields["speculative_eagle_topk"]) == ("3", "1")
    assert fields["speculative_num_draft_tokens"] == "4"
    assert (run_dir / "versions" / "initial" / "model.safetensors").exists()
    assert json.loads(run)["settings"]["run_dir"] == str(run_dir)
    assert json.loads(run)["served_dtype"] == "bfloat16"


def test_a_run_folders_draft_with_another_vocabulary_than_is_asked_for_is_refused(parser, target, tmp_path, capsys):
    run_dir = tmp_path / "run"
    init_draft(str(target), run_dir / "versions" / "initial", draft_vocab_size=16, dtype="float32")
    given = ["--model-path", str(target), "--dtype", "float32", "--enable-draft-training"]
    given += ["--draft-training-run-dir", str(run_dir), "--draft-training-draft-vocab-size"]
    with pytest.raises(SystemExit):
        flags.consume_flags(None, parser.parse_args([*given, "24"]))
    assert "draft_vocab_size 24, where it has 16" in capsys.readouterr().err
    assert json.loads(answer(parse(*given, "16"))[1])["settings"]["draft_vocab_size"] == 16


def test_revisions_are_those_that_were_asked_for(target, tmp_path):
    other = make_target(tmp_path / "other", seed=1)
    draft = init_draft(str(other), tmp_path / "draft", draft_vocab_size=32, seed=2)
    for repository, folders in {"org/target": {"main": target, "v2": other}, "org/draft": {"v3": draft}}.items():
        for revision, folder in folders.items():
            keep_in_cache(tmp_path / "hub", repository, revision, folder)
    fields, run = answer(
        parse(
            "--model-path", "org/target", "--revision", "v2", "--download-dir", str(tmp_path / "hub"),
            "--tokenizer-path", "org/target", "--dtype", "float32", "--enable-draft-training",
            "--draft-training-run-dir", str(tmp_path / "run"), "--speculative-draft-model-path", "org/draft",
            "--speculative-draft-model-revision", "v3",
            environment={"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        )
    )  # fmt: skip
    assert json.loads(run)["target_fingerprint"] == fingerprint_target(other)
    found, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run/versions/given", draft))
    assert torch.equal(found["fc.weight"], given["fc.weight"])


def keep_in_cache(hub, repository, revision, folder):
    """As ``huggingface_hub`` keeps what it has fetched."""
    cached = hub / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir(exist_ok=True)
    (cached / "refs" / revision).write_text(commit)


def test_where_drafting_cannot_be_switched_off_it_never_is_and_that_is_said(parser, capsys):
    def settled(*given):
        args = parser.parse_args(["--model-path", "-", *given])
        return flags._settle_drafting(args, DraftTrainingSettings()).drafting

    assert settled() == "auto"
    assert "every step drafts" not in capsys.readouterr().err
    assert settled("--attn-dp-size", "2") == settled("--dp-size", "2", "--enable-dp-attention") == "always"
    assert settled("--dp-size", "2") == "auto"
    assert settled("--speculative-eagle-topk", "4") == "always"
    assert "every step drafts (--draft-drafting always), because of --speculative-eagle-topk" in capsys.readouterr().err


BUSY = 5  # a GPU that somebody else uses


@pytest.mark.parametrize(
    ("there", "arguments", "device"),
    [
        (0, [], "cpu"),
        (1, [], "cpu"),
        (2, [], "cuda:1"),
        (7, ["--tp-size", "5"], "cuda:6"),
        (6, ["--tp-size", "5"], "cpu"),
        (8, ["--tp-size", "2", "--dp-size", "2"], "cuda:4"),
        (8, ["--tp-size", "4", "--dp-size", "4", "--enable-dp-attention"], "cuda:4"),
        (8, ["--tp-size", "4", "--attn-dp-size", "4"], "cuda:4"),
        (8, ["--base-gpu-id", "1", "--gpu-id-step", "2", "--tp-size", "2"], "cuda:4"),
        (8, ["--tp-size", "6", "--draft-training-trainer-processes", "2"], "cuda:6"),
        (8, ["--tp-size", "7", "--draft-training-trainer-processes", "2"], "cpu"),
        (8, ["--tp-size", "8", "--draft-training-trainer-device", "cuda:3"], "cuda:3"),
        (2, ["--draft-training-trainer-processes", "4"], "cpu"),
        (8, ["--device", "cpu"], "cpu"),
        (4, ["--tp-size", "4", "--nnodes", "2"], "cuda:2"),
    ],
)
def test_the_trainer_has_the_gpus_that_the_server_leaves_or_says_that_there_are_none(
    parser, monkeypatch, capsys, there, arguments, device
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda gpu: 1 << 30 if gpu != BUSY else 70 << 30)
    args = parser.parse_args(["--model-path", "unused", *arguments])
    given = given_settings(args, DraftTrainingSettings, "draft_training_")
    settings = flags._settle_device(args, load_settings(DraftTrainingSettings, given, None))
    assert settings.trainer_device == device
    is_missed = device == "cpu" and there > 0 and "--device" not in arguments
    assert ("the trainer computes on the CPU" in capsys.readouterr().err) == is_missed


def test_a_node_after_the_first_begins_with_the_same_draft_and_has_no_trainer(parser, target, tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "apply_run_hooks", lambda: None)
    monkeypatch.setenv(RUN_VARIABLE, "")
    shared = ["--model-path", str(target), "--dtype", "float32", "--draft-training-run-dir", str(tmp_path)]
    drafts = []
    for node in (0, 1):
        given = [*shared, "--enable-draft-training", "--nnodes", "2", "--tp-size", "2", "--node-rank", str(node)]
        flags.consume_flags(None, parser.parse_args(given))
        run = Run.inherited()
        assert (run.node, run.nodes) == (node, 2)
        assert run.settings.trainer == ("none" if node else "spawn")
        drafts.append(load_config(run.version_path(0))[CONTENT_KEY])
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--draft-training-run-dir given without --enable-draft-training"),
        (["--enable-draft-training", "--draft-training-ttt-steps", "0"], "'ttt_steps' = '0' is not accepted"),
        (["--enable-draft-training", "--draft-training-ttt-stepz", "3"], "--draft-training-ttt-stepz"),
        (["--enable-draft-training", "--speculative-algorithm", "NGRAM"], "not --speculative-algorithm NGRAM"),
        (["--enable-draft-training", "--pp-size", "2"], "without pipeline parallelism"),
        (["--enable-draft-training", "--nnodes", "2", "--dp-size", "2"], "give --draft-training-trainer none"),
        (
            ["--enable-draft-training", "--draft-training-trainer-device", "cuda:99"],
            "needs 100 GPU(s)",
        ),
        (
            ["--enable-draft-training", "--speculative-draft-model-quantization", "fp8"],
            "--speculative-draft-model-quantization fp8: versions are swapped in as trained",
        ),
        (["--enable-draft-training", "--dtype", "float32", "--json-model-override-args", "{"], "'{' is no JSON"),
        (["--enable-draft-training", "--load-format", "dummy"], "--load-format dummy: the trainer reads"),
        (["--enable-draft-training", "--speculative-draft-window-size", "64"], "attend to all of their sequence"),
        (["--enable-draft-training", "--smg-grpc-mode"], "--smg-grpc-mode: its control service"),
        (["--enable-draft-training", "--dtype", "float16"], "not float16; give --dtype bfloat16"),
        (
            ["--enable-draft-training", "--draft-training-prefix-spill-dir", "/dev/null"],
            "'prefix_spill_dir' = '/dev/nul",
        ),
        (["--enable-draft-training", "--draft-training-run-dir", "/dev/null/run"], "'run_dir' = '/dev/null/run'"),
        (["--enable-draft-training", "--model-path", "/no/where"], "'/no/where' is no folder here"),
        (
            ["--enable-draft-training", "--dtype", "float32", "--speculative-draft-model-path", "/no/where"],
            "'/no/where' is no folder here",
        ),
        (["--enable-draft-training", "--dtype", "float32", "--disaggregation-mode", "decode"], "trainer none"),
        (
            ["--enable-draft-training", "--draft-drafting", "auto", "--speculative-eagle-topk", "2"],
            "--draft-drafting auto does not go with --speculative-eagle-topk",
        ),
        # The target is float32, which SGLang serves as float16 where no type is asked for.
        (["--enable-draft-training"], "not float16; give --dtype bfloat16"),
    ],
)
def test_contradictions_stop_the_start(parser, target, tmp_path, capsys, arguments, message):
    given = ["--model-path", str(target), "--draft-training-run-dir", str(tmp_path), *arguments]
    with pytest.raises(SystemExit) as stopped:
        flags.consume_flags(None, parser.parse_args(given))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", [["--device", "cpu"], []])
def test_a_cpu_whose_engine_is_not_asked_for_is_refused(parser, target, tmp_path, capsys, monkeypatch, device):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    given = ["--model-path", str(target), "--draft-training-run-dir", str(tmp_path), "--enable-draft-training", *device]
    with pytest.raises(SystemExit):
        flags.consume_flags(None, parser.parse_args(given))
    assert "set SGLANG_USE_CPU_ENGINE=1" in capsys.readouterr().err


def test_help_has_a_group_with_every_setting(parser):
    shown = parser.format_help()
    assert "draft training:" in shown
    for name in DraftTrainingSettings.model_fields:
        assert flag_of(DraftTrainingSettings, name, "draft_training_") in shown
    assert "--draft-capture-max-mb-s" in shown
    assert "--draft-capture-sample" in shown

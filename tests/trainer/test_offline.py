"""Stored datasets: what comes back, what is damaged, and training that goes on exactly where it was killed."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sglang_specforge.prepared import Prepared
from sglang_specforge.target import fingerprint_target
from sglang_specforge.versions import VersionFolder
from tests.tiny import HIDDEN, VOCAB, make_target
from trainer.cli import main
from trainer.offline.capture import mask_of
from trainer.offline.layout import OF_IMAGES, DatasetError, Manifest
from trainer.offline.reader import StoredSamples
from trainer.offline.source import Split
from trainer.offline.writer import DatasetWriter
from trainer.rows import Rows

TRAINING = {
    "ttt-steps": 3, "batch-tokens": 64, "learning-rate": 1e-2, "warmup-steps": 5, "epochs": 1000, "holdout-every": 8,
    "draft-vocab-size": 32, "publish-every-steps": 10, "schedule": "cosine",
}  # fmt: skip


def make_stored(i):
    """Of a sequence: its id, rows and loss mask; every fourth shows an image in its prompt."""
    g = torch.Generator().manual_seed(i)
    T = 8 + i % 13
    tokens_T, mask_T = torch.randint(0, VOCAB, (T,), generator=g), torch.arange(T) >= 3
    states = torch.randn(T, 3 * HIDDEN, generator=g), 30 * torch.randn(T, HIDDEN, generator=g)
    rows = Rows.of_text(tokens_T, *states)
    id = Prepared.of(tokens_T.tolist(), mask_T.tolist()).id
    if i % 4 == 0:
        tokens_T[1:3] = -(1 << 40) - i
        places_23 = torch.tensor([[1, 1, 1], [1, 1, 2]], dtype=torch.int32)
        rows = rows._replace(embeds_MH=torch.randn(2, HIDDEN, generator=g), places_M3=places_23)
    return id, rows, mask_T


def write(folder, target, samples=range(40), stored="float32", shard_bytes=20_000):
    manifest = Manifest(
        target_fingerprint=fingerprint_target(target), target_path=str(target), served_dtype="float32",
        hidden_size=HIDDEN, stored=stored,
    )  # fmt: skip
    writer = DatasetWriter(folder, manifest, shard_bytes)
    for i in samples:
        id, rows, mask_T = make_stored(i)
        if id not in writer.stored_ids:
            writer.add(id, rows, mask_T, slice=("even", "odd")[i % 2])
    writer.flush()
    return writer


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "target")


@pytest.fixture
def data(tmp_path, target):
    write(tmp_path / "data", target)
    return tmp_path / "data"


@pytest.mark.parametrize(("stored", "error"), [("float32", 0), ("bfloat16", 2**-8), ("float8", 2**-4)])
def test_states_come_back_as_they_were_stored(tmp_path, target, stored, error):
    write(tmp_path / "data", target, stored=stored)
    samples = StoredSamples(tmp_path / "data")
    assert len(samples.entries) == 40
    found = {entry.id: samples.load(entry) for entry in samples.entries}
    for i in range(40):
        id, rows, mask_T = make_stored(i)
        assert torch.equal(found[id].tokens_T, rows.tokens_N.clamp(min=-1))
        assert torch.equal(found[id].places_M3, rows.places_M3)
        assert torch.equal(found[id].generated_T, mask_T)
        pairs = zip(found[id].rows[1:4], rows[1:4], strict=True)
        for states, wanted in pairs:
            highest = wanted.abs().amax(-1, keepdim=True)
            assert ((states.float() - wanted).abs() <= error * wanted.abs() + error * highest / 64).all()
    assert samples.damaged == []


def test_a_dataset_of_before_images_is_read(tmp_path, target):
    numbers = [i for i in range(40) if i % 4]
    write(tmp_path / "data", target, numbers)
    manifest = tmp_path / "data" / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 2'))
    for index in (tmp_path / "data" / "index").iterdir():
        pq.write_table(pq.read_table(index).drop_columns(["image_row", "image_rows"]), index)
    for shard in (tmp_path / "data" / "shards").iterdir():
        with safe_open(shard, "pt") as file:
            kept = {n: file.get_tensor(n) for n in file.keys() if n not in OF_IMAGES}  # noqa: SIM118
            save_file(kept, shard, metadata=file.metadata())
    samples = StoredSamples(tmp_path / "data")
    found = {entry.id: samples.load(entry) for entry in samples.entries}
    assert samples.damaged == []
    assert all(torch.equal(found[id].aux_T3H, rows.aux_N3H) for id, rows, _ in map(make_stored, numbers))


def test_the_loss_mask_is_on_the_answer_wherever_images_put_it():
    place, answer = 60, [7, 8, 9]
    sequence = Prepared.of([1, place, 2, 3, *answer], [False] * 4 + [True] * 3, ["http://x/a.png"])
    for around in ([-5] * 4, [50, *[-5] * 4, 51], [-5, -5, 50, -5, -5, 51]):
        captured = [1, *around, 2, 3, *answer]
        mask = mask_of(sequence, captured)
        assert [token for token, is_learnt in zip(captured, mask, strict=True) if is_learnt] == answer
        assert mask_of(sequence, [1, *around, 2, 3, 7, 8]) is None
        assert mask_of(sequence, [1, *around, 2, 3, -6, 8, 9]) is None
        again = [1, *around, 2, 3, 70, 71, 8, 9]  # the answer's text in other tokens
        assert mask_of(sequence, again) == [False] * (len(again) - 4) + [True] * 4
    text = Prepared.of(answer, [True] * 3)
    assert mask_of(text, answer) == [True] * 3
    assert mask_of(text, [1, *answer]) is None


def test_slices_are_drawn_by_their_weights_and_evaluated_apart(tmp_path, data):
    main(flags(tmp_path / "run", data, slice_weights="even=2.5,odd=0.5", epochs=20, holdout_every=4))
    samples = StoredSamples(data)
    tokens = Counter()
    for entry in Split.of(samples.entries, 4).training:
        tokens[entry.slice] += 20 * entry.length * {"even": 2.5, "odd": 0.5}[entry.slice]
    lines = [json.loads(line) for line in _lines(tmp_path / "run")]
    assert sum(line.get("tokens", 0) for line in lines) == pytest.approx(tokens.total(), rel=0.05)
    assert {"held_out_acceptance_length/even", "held_out_acceptance_length/odd"} <= set(lines[-1])


def test_what_is_stored_is_not_stored_again_and_files_are_the_owners_alone(data, target):
    before = sorted(p.name for p in data.rglob("*"))
    writer = write(data, target)
    assert len(writer.stored_ids) == 40
    assert sorted(p.name for p in data.rglob("*")) == before
    assert len(list((data / "shards").iterdir())) > 3
    assert {p.stat().st_mode & 0o777 for p in (*data.glob("shards/*"), *data.glob("index/*"))} == {0o600}


def test_other_states_are_not_mixed_in(data, target):
    with pytest.raises(DatasetError, match="stored float32, these have bfloat16"):
        write(data, target, stored="bfloat16")


def test_a_dataset_of_another_target_is_refused_by_name(data):
    with pytest.raises(DatasetError, match="not of 0123456789abcdef"):
        StoredSamples(data, "0123456789abcdef")


def damage(data, how):
    shard = sorted((data / "shards").iterdir())[1]
    content = bytearray(shard.read_bytes())
    if how == "truncated":
        content = content[:-100]
    elif how == "flipped":
        content[-40] ^= 1
    else:
        content = content.replace(b'target_fingerprint":"', b'target_fingerprint":"0')
        content[:8] = (int.from_bytes(content[:8], "little") + 1).to_bytes(8, "little")
    shard.write_bytes(content)
    return shard.stem


@pytest.mark.parametrize(
    ("how", "named"),
    [("truncated", "shard {}: "), ("flipped", "of shard {}: "), ("foreign", "shard {}: its target_fingerprint")],
)
def test_damage_is_named_and_the_rest_is_trained_on(tmp_path, data, capsys, how, named):
    shard = damage(data, how)
    main(flags(tmp_path / "run", data, max_steps=12))
    assert f"left out: {'sample' if how == 'flipped' else 'shard'}" in (said := capsys.readouterr().out)
    assert named.format(shard) in said
    assert len(losses(tmp_path / "run")) == 12


def flags(run_dir, data, **more):
    given = {**TRAINING, "data": data, "run-dir": run_dir, **{k.replace("_", "-"): v for k, v in more.items()}}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def start(*arguments, launcher=()):
    command = [sys.executable, "-m", *launcher, "trainer", *arguments]
    return subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_killed_and_resumed_gives_the_losses_of_not_having_stopped(tmp_path, data, capsys):
    main(flags(tmp_path / "straight", data, max_steps=60))
    first = start(*flags(tmp_path / "killed", data, max_steps=60))
    while first.poll() is None and len(_lines(tmp_path / "killed")) < 33:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    saved = [int(p.name) for p in (tmp_path / "killed" / "checkpoints").iterdir() if p.name.isdigit()]
    resumed = start(*flags(tmp_path / "killed", data, max_steps=60))
    said, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, said
    assert f"resumed from step {max(saved)}" in said
    main(flags(tmp_path / "killed", data, max_steps=60))
    assert "is done, at step 60" in capsys.readouterr().out
    expected = losses(tmp_path / "straight")
    assert list(expected) == list(range(1, 61))
    assert losses(tmp_path / "killed") == expected


def _lines(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"micro_batch_tokens": 24, "optimizer": "muon", "objective": "lk_lambda"},
    ],
)
def test_two_processes_give_the_losses_of_one(tmp_path, data, options):
    main(flags(tmp_path / "one", data, max_steps=25, **options))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    both = start(*flags(tmp_path / "two", data, max_steps=25, **options), launcher=torchrun)
    said, _ = both.communicate(timeout=240)
    assert both.returncode == 0, said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 26))
    assert two == {step: pytest.approx(loss, rel=1e-4) for step, loss in one.items()}


def test_checkpointed_and_accumulated_steps_are_those_of_one_pass(tmp_path, data):
    main(flags(tmp_path / "plain", data, max_steps=10))
    main(flags(tmp_path / "small", data, max_steps=10, micro_batch_tokens=24, activation_checkpointing="true"))
    plain, small = losses(tmp_path / "plain"), losses(tmp_path / "small")
    assert small == {step: pytest.approx(loss, rel=1e-5) for step, loss in plain.items()}


def test_versions_best_and_the_draft_vocabulary_of_the_data(tmp_path, data, capsys):
    main(flags(tmp_path / "run", data, max_steps=40))
    assert "draft vocabulary: 32 of 48 tokens hold" in capsys.readouterr().out
    versions = VersionFolder(tmp_path / "run")
    assert versions.newest() == 4
    assert versions.best() in [versions.path(v) for v in versions.published()]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "dataset.json cannot be read"),
        ({"objective": "mse"}, "'objective' = 'mse' is not accepted"),
        ({"cpu_offload": "true"}, "'cpu_offload' is for a trainer on a GPU"),
        ({"slice_weights": "code=0"}, "the weight of slice 'code' is 0.0"),
        ({"draft_topk": 2, "draft_tokens": 99}, "such a tree has 2 to 11"),
    ],
)
def test_bad_settings_and_no_data_are_named(tmp_path, capsys, given, named):
    with pytest.raises(SystemExit) as end:
        main(flags(tmp_path / "run", tmp_path / "nowhere", **given))
    assert end.value.code == 2
    assert named in capsys.readouterr().err


def test_a_run_that_began_from_another_draft_is_not_gone_on_with(tmp_path, data, capsys):
    main(flags(tmp_path / "run", data, max_steps=2))
    with pytest.raises(SystemExit) as end:
        main(flags(tmp_path / "run", data, max_steps=4, draft=tmp_path / "run" / "versions" / "initial"))
    assert end.value.code == 2
    assert "began from a random draft; go on without --draft" in capsys.readouterr().err


def test_a_run_goes_on_from_the_draft_that_it_was_given_and_from_no_other(tmp_path, data, capsys):
    main(flags(tmp_path / "other", data, max_steps=2))
    first, second = (tmp_path / "other" / "versions" / name for name in ("initial", "000001"))
    main(flags(tmp_path / "run", data, max_steps=2, draft=first))
    main(flags(tmp_path / "run", data, max_steps=3, draft=first))
    assert VersionFolder(tmp_path / "run").newest() == 2
    with pytest.raises(SystemExit) as end:
        main(flags(tmp_path / "run", data, max_steps=4, draft=second))
    assert end.value.code == 2
    assert f"began from another draft than {second}" in capsys.readouterr().err


def test_a_run_goes_on_with_the_draft_that_it_made_and_says_where_another_is_asked_for(tmp_path, data, capsys):
    main(flags(tmp_path / "run", data, max_steps=2, draft_vocab_size=24))
    main(flags(tmp_path / "run", data, max_steps=3, draft_vocab_size=24, recipe="eagle3"))
    unsaid = flags(tmp_path / "run", data, max_steps=4)
    at = unsaid.index("--draft-vocab-size")
    main(unsaid[:at] + unsaid[at + 2 :])
    with pytest.raises(SystemExit) as end:
        main(flags(tmp_path / "run", data, max_steps=5, draft_vocab_size=32, recipe="eagle3.1"))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "draft_vocab_size 32, where it has 24; recipe 'eagle3.1', where it has no variant" in said


@pytest.mark.parametrize(
    ("run_dir", "given", "named"),
    [
        ("/dev/null/run", {}, "'run_dir' = '/dev/null/run': no file can be made there"),
        ("run", {"draft": "/no/where"}, "'/no/where' is no folder here"),
        ("run", {"target": "/no/where"}, "'/no/where' is no folder here"),
    ],
)
def test_folders_that_are_not_there_are_named(tmp_path, data, capsys, run_dir, given, named):
    with pytest.raises(SystemExit) as end:
        main(flags(tmp_path / run_dir, data, **given))
    assert end.value.code == 2
    assert named in capsys.readouterr().err


def test_data_that_is_all_held_out_is_refused():
    with pytest.raises(DatasetError, match="all 3 samples are held out"):
        Split([], [None] * 3).check()


def test_a_weighted_slice_that_the_data_lacks_is_named(tmp_path, data, capsys):
    with pytest.raises(SystemExit):
        main(flags(tmp_path / "run", data, slice_weights="evn=2"))
    assert "the data has no slice 'evn'; it has ['even', 'odd']" in capsys.readouterr().err

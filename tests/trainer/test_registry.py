"""A draft kind that the trainer has never heard of, and EAGLE 3.1's variants, through the same loop."""

import pytest
import torch

from sglang_specforge.checkpoint import CheckpointError, load_checked, load_config
from sglang_specforge.drafts import EAGLE3_VARIANTS, expected_shapes, kind_of
from sglang_specforge.new_draft import RECIPES, init_draft
from sglang_specforge.target import fingerprint_target
from sglang_specforge.versions import VersionFolder
from tests.tiny import make_run, make_target
from tests.trainer import linear_draft
from tests.trainer.test_offline import flags, losses, write
from trainer.cli import main
from trainer.learner import load_draft

VARIANTS = {
    "another kind": {"architectures": [linear_draft.LINEAR.architecture]},
    "eagle 3.1": RECIPES["eagle3.1"],
    "all variants": dict.fromkeys(EAGLE3_VARIANTS, True),
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        }
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_publishes_and_passes_the_servers_checks(tmp_path, variant):
    target = make_target(tmp_path / "target")
    write(tmp_path / "data", target)
    draft = init_draft(str(target), tmp_path / "draft", draft_vocab_size=32, dtype="float32", variant=VARIANTS[variant])
    main(flags(tmp_path / "run", tmp_path / "data", draft=draft, max_steps=60))
    found = losses(tmp_path / "run")
    assert sum(found[step] for step in range(51, 61)) < 0.97 * sum(found[step] for step in range(1, 11))
    versions = VersionFolder(tmp_path / "run")
    newest = versions.path(versions.newest())
    config = load_config(newest)
    tensors = load_checked(newest, load_config(draft), fingerprint_target(target))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes(config)
    before = load_checked(draft, config, fingerprint_target(target))
    same = {name for name in tensors if torch.equal(tensors[name], before[name])}
    assert same == {"d2t", "t2d"}


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_a_server_s_overrides_hold_for_the_draft_that_is_trained(tmp_path, name):
    target = make_target(tmp_path / "target")
    run = make_run(tmp_path, target)
    given = {key: value for key, value in VARIANTS["yarn"]["rope_parameters"].items() if key != "rope_theta"}
    overridden = run.model_copy(update={"overrides": {name: given, "num_hidden_layers": 9}})
    made = init_draft(str(target), tmp_path / "made", draft_vocab_size=32, dtype="float32", variant=VARIANTS["yarn"])
    like_made = run.model_copy(update={"draft_path": str(made)})
    drafts = [load_draft(job, job.version_path(0)) for job in (run, overridden, like_made)]
    plain, trained, expected = (draft._rotary(torch.zeros(1), torch.arange(40))[0] for draft in drafts)
    assert torch.equal(trained, expected)
    assert not torch.allclose(trained, plain)


def test_a_draft_without_keys_can_have_its_activations_made_again(tmp_path):
    target = make_target(tmp_path / "target")
    write(tmp_path / "data", target)
    variant = VARIANTS["another kind"]
    draft = init_draft(str(target), tmp_path / "draft", draft_vocab_size=32, dtype="float32", variant=variant)
    for name, again in (("kept", "false"), ("again", "true")):
        main(flags(tmp_path / name, tmp_path / "data", draft=draft, max_steps=5, activation_checkpointing=again))
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")


def test_an_unknown_kind_is_refused_with_those_that_are_known():
    with pytest.raises(
        CheckpointError, match="'Medusa' cannot be trained; known are: LinearDraft, LlamaForCausalLMEagle3"
    ):
        kind_of({"architectures": ["Medusa"]})

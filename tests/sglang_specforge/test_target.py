"""What is read of a target: its embedding and head, wherever its family has them, and what a draft takes over."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sglang_specforge.new_draft import draft_config
from sglang_specforge.target import TargetError, final_softcap, load_embedding_and_head, load_target_config

V, H = 16, 8
EMBED_VH, HEAD_VH = torch.randn(V, H), torch.randn(V, H)


def target_like(**fields):
    return SimpleNamespace(intermediate_size=64, vocab_size=V, **fields)


def save(folder, shards, index=False):
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-{number}.safetensors")
    if index:
        weight_map = {name: f"model-{number}.safetensors" for number, shard in enumerate(shards) for name in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens", "lm_head"),
        ("model.language_model.embed_tokens", "lm_head"),
        ("language_model.model.embed_tokens", "language_model.lm_head"),
    ],
)
def test_embedding_and_head_are_found_where_the_family_has_them(tmp_path, embedding, head, index):
    others = {"model.layers.8.embed_tokens.weight": torch.zeros(V, H), "visual.embed_tokens.weight": torch.zeros(2, 2)}
    shards = [{f"{embedding}.weight": EMBED_VH, **others}, {f"{head}.weight": HEAD_VH}]
    embed_VH, head_VH = load_embedding_and_head(save(tmp_path, shards, index))
    assert torch.equal(embed_VH, EMBED_VH)
    assert torch.equal(head_VH, HEAD_VH)


def test_the_embedding_is_the_head_of_a_target_that_has_no_other(tmp_path):
    embed_VH, head_VH = load_embedding_and_head(save(tmp_path, [{"model.embed_tokens.weight": EMBED_VH}]))
    assert embed_VH is head_VH


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"visual.embed.weight": EMBED_VH}, "no embedding that is known here: model.embed_tokens, model.language"),
        (
            {"model.embed_tokens.weight": EMBED_VH, "language_model.lm_head.qweight": HEAD_VH},
            r"a quantized language_model.lm_head \(qweight\)",
        ),
    ],
)
def test_a_target_without_a_plain_embedding_and_head_is_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(TargetError, match=message):
        load_embedding_and_head(save(tmp_path, [tensors]))


WRITTEN = {
    "model_type": "of_its_own", "auto_map": {"AutoConfig": "configuration.Config"}, "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 8, "vocab_size": V, "kv_lora_rank": 8,
    "rope_theta": 5e4, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_a_target_that_transformers_does_not_know_is_read_as_it_is_written(tmp_path, caplog, nested):
    written = {"model_type": "of_images", "text_config": WRITTEN} if nested else WRITTEN
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = load_target_config(tmp_path)
    assert "is read as it is written" in caplog.text
    drafted = draft_config(config, V, "float32", "")
    assert (drafted["hidden_size"], drafted["num_key_value_heads"]) == (32, 4)
    rope = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert drafted["rope_parameters"] | rope == drafted["rope_parameters"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{", "cannot read its config.json"),
        ("[]", "cannot read its config.json"),
        (json.dumps({"model_type": "of_its_own", "hidden_size": 32}), "and it has no intermediate_size, num_attention"),
        (json.dumps(WRITTEN | {"num_attention_heads": "four"}), "cannot read its config.json"),
        (json.dumps(WRITTEN | {"num_hidden_layers": 4}), "has 4 layers"),
    ],
)
def test_a_configuration_that_says_too_little_is_refused(tmp_path, written, message):
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(TargetError, match=message):
        load_target_config(tmp_path)


@pytest.mark.parametrize(("given", "softcap"), [({}, None), (None, None), (0.0, None), (-1.0, None), (30.0, 30.0)])
def test_logits_are_bounded_where_the_target_says_so(given, softcap):
    config = SimpleNamespace() if given == {} else SimpleNamespace(final_logit_softcapping=given)
    assert final_softcap(config) == softcap


@pytest.mark.parametrize(
    ("of_target", "of_draft"),
    [
        ({"num_attention_heads": 8, "hidden_size": 512, "num_key_value_heads": 2, "head_dim": 96}, (8, 2, 96)),
        ({"num_attention_heads": 8, "hidden_size": 512}, (8, 8, 64)),
        (  # DeepSeek V3
            {
                "num_attention_heads": 128, "hidden_size": 7168, "num_key_value_heads": 128, "head_dim": 64,
                "kv_lora_rank": 512,
            },
            (56, 8, 128),
        ),
        ({"num_attention_heads": 20, "hidden_size": 2560, "kv_lora_rank": 512}, (20, 4, 128)),
        ({"num_attention_heads": 4, "hidden_size": 64, "kv_lora_rank": 32}, (4, 4, 16)),
    ],
)  # fmt: skip
def test_a_draft_has_its_targets_heads_but_few_keys_where_the_target_keeps_none(of_target, of_draft):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = draft_config(target_like(rope_parameters=rope, **of_target), V, "float32", "")
    assert tuple(config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")) == of_draft


@pytest.mark.parametrize(
    ("of_target", "of_draft"),
    [
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},) * 2,
        (
            {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            {"rope_type": "default", "rope_theta": 1e6},
        ),
        (
            {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": [1.0] * 6},
            {"rope_type": "default", "rope_theta": 1e4},
        ),
        (
            {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            },
            {"rope_type": "default", "rope_theta": 1e6},
        ),
    ],
)
def test_a_draft_turns_whole_heads_by_one_position_a_token(of_target, of_draft):
    target = target_like(rope_parameters=of_target, num_attention_heads=4, hidden_size=32)
    assert draft_config(target, V, "float32", "")["rope_parameters"] == of_draft

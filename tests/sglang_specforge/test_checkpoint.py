"""Drafts on disk: created for a target, refused when they do not belong to it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_specforge.checkpoint import FINGERPRINT_KEY, CheckpointError, load_checked, load_config
from sglang_specforge.foreign_draft import import_draft
from sglang_specforge.manifest import Manifest
from sglang_specforge.new_draft import init_draft
from sglang_specforge.target import TargetError, fingerprint_target, load_embedding_and_head
from sglang_specforge.versions import VersionFolder
from tests.tiny import VOCAB, make_target


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "target")


@pytest.fixture
def draft(tmp_path, target):
    return init_draft(str(target), tmp_path / "draft", draft_vocab_size=32)


def check(draft, target):
    return load_checked(draft, load_config(draft), fingerprint_target(target))


def change(draft, **tensors):
    file = draft / "model.safetensors"
    found = {**load_file(file), **tensors}
    save_file({n: t for n, t in found.items() if t is not None}, file)


def test_a_new_draft_passes_its_own_checks(draft, target):
    tensors = check(draft, target)
    assert tensors["t2d"].sum() == 32
    assert tensors["d2t"].eq(0).all()
    assert load_config(draft)["vocab_size"] == VOCAB


def test_seeds_decide_the_weights(tmp_path, target):
    a, b, c = (init_draft(str(target), tmp_path / name, seed=seed) for name, seed in [("a", 1), ("b", 1), ("c", 2)])
    fc = [load_file(d / "model.safetensors")["fc.weight"] for d in (a, b, c)]
    assert torch.equal(fc[0], fc[1])
    assert not torch.equal(fc[0], fc[2])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc.weight": torch.zeros(16, 47)}, r"fc\.weight has shape \(16, 47\)"),
        ({"norm.weight": torch.full((16,), float("nan"))}, r"norm\.weight has values that are not finite"),
        ({"lm_head.weight": None}, r"lm_head\.weight is missing"),
        ({"midlayer.extra": torch.zeros(1)}, r"midlayer\.extra is not part"),
        ({"d2t": torch.ones(32, dtype=torch.int64)}, "d2t and t2d disagree"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_tensor(draft, target, tensors, message):
    change(draft, **tensors)
    with pytest.raises(CheckpointError, match=message):
        check(draft, target)


def test_a_draft_that_computes_otherwise_is_refused_by_setting(tmp_path, draft, target):
    other = shutil.copytree(draft, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**load_config(draft), "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match="rms_norm_eps is 0.5"):
        load_checked(other, load_config(draft), fingerprint_target(target))


def test_a_draft_of_another_target_is_refused_by_fingerprint(tmp_path, draft):
    other = make_target(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=fingerprint_target(other)):
        check(draft, other)


def test_a_file_that_is_no_checkpoint_is_refused(draft, target):
    (draft / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="cannot be read"):
        check(draft, target)
    with pytest.raises(CheckpointError, match="config.json"):
        load_config(draft / "nowhere")


def test_a_shallow_target_is_refused(target, tmp_path):
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(TargetError, match="has 4 layers"):
        init_draft(str(target), tmp_path / "out")


def test_a_target_with_a_quantized_head_is_refused(target, tmp_path):
    file = target / "model.safetensors"
    tensors = load_file(file)
    head_VH = tensors.pop("lm_head.weight")
    for changed, named in (
        ({"lm_head.weight": head_VH.to(torch.float8_e4m3fn)}, "quantized lm_head .weight of torch.float8_e4m3fn"),
        ({"lm_head.qweight": head_VH.int()}, "quantized lm_head .qweight"),
    ):
        save_file(tensors | changed, file, {"format": "pt"})
        with pytest.raises(TargetError, match=named):
            init_draft(str(target), tmp_path / "out")


def test_a_draft_from_elsewhere_is_taken_in(tmp_path, draft, target):
    """SpecForge's layout of names, an embedding of its own, no t2d, an older rotary setting, no fingerprint."""
    config = load_config(draft)
    for name in (FINGERPRINT_KEY, "rope_parameters", "dtype"):
        del config[name]
    (draft / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    tensors = load_file(draft / "model.safetensors")
    del tensors["t2d"]
    tensors["embed_tokens.weight"] = torch.zeros(VOCAB, 16)
    save_file({n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}, draft / "model.safetensors")

    taken = import_draft(draft, target, tmp_path / "taken")
    found = check(taken, target)
    assert torch.equal(found["midlayer.mlp.up_proj.weight"], tensors["midlayer.mlp.up_proj.weight"])
    assert found["t2d"].sum() == 32
    assert load_config(taken)["rope_parameters"]["rope_theta"] == 5000.0
    assert load_config(taken)["dtype"] == "float32"


@pytest.mark.parametrize("of_recipe", [{"fc_norm": True}, {"norm_before_fc": True}])
def test_older_spellings_of_a_draft_from_elsewhere_are_understood(tmp_path, target, of_recipe):
    draft = init_draft(str(target), tmp_path / "draft", draft_vocab_size=32, variant=of_recipe)
    config, tensors = load_config(draft), load_file(draft / "model.safetensors")
    older = {"0": "low", "1": "mid", "2": "high"}
    renamed = {n.replace(f"fc_norm.{n[8:9]}", f"aux_norm_{older.get(n[8:9])}"): t for n, t in tensors.items()}
    config |= {"model_type": "llama4_text", "intermediate_size_mlp": config["intermediate_size"]}
    config["intermediate_size"] //= 2
    for name in of_recipe:
        del config[name]
    config |= {"use_aux_norm": True} if "fc_norm" in of_recipe else {"eagle_config": of_recipe}
    save_file(renamed, draft / "model.safetensors")
    (draft / "config.json").write_text(json.dumps(config))

    taken = import_draft(draft, target, tmp_path / "taken")
    found = check(taken, target)
    assert found.keys() == tensors.keys()
    assert load_config(taken) | of_recipe == load_config(taken)


def test_a_draft_without_a_head_of_its_own_gets_the_targets(tmp_path, target):
    draft = init_draft(str(target), tmp_path / "draft", draft_vocab_size=VOCAB)
    config, tensors = load_config(draft), load_file(draft / "model.safetensors")
    for name in ("lm_head.weight", "d2t", "t2d"):
        del tensors[name]
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is missing"):
        import_draft(draft, target, tmp_path / "taken")
    del config["draft_vocab_size"]
    (draft / "config.json").write_text(json.dumps(config))
    found = check(import_draft(draft, target, tmp_path / "taken"), target)
    _, head_VH = load_embedding_and_head(target)
    assert torch.equal(found["lm_head.weight"], head_VH)


def test_a_draft_may_be_given_as_pytorch_model_bin(tmp_path, draft, target):
    tensors = load_file(draft / "model.safetensors")
    (draft / "model.safetensors").unlink()
    torch.save(tensors, draft / "pytorch_model.bin")
    found = check(import_draft(draft, target, tmp_path / "taken"), target)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    (draft / "pytorch_model.bin").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        import_draft(draft, target, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architecture 'LlamaForCausalLM' cannot be trained"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 2 cannot be trained, only 1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ({FINGERPRINT_KEY: "feedfacefeedface"}, "feedfacefeedface"),
        ({"intermediate_size": 25}, r"midlayer\.mlp\.gate_proj\.weight has shape"),
        ({"architectures": {"a": 1}}, "architecture None cannot be trained"),
        ({"num_attention_heads": 0}, r"config\.json is no Llama draft's"),
        ({"rope_parameters": "none"}, r"config\.json is no Llama draft's"),
        (
            {"rope_parameters": {"rope_type": "proportional"}},
            r"rope_type 'proportional' cannot be trained, only default",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}},
            r"mrope_section \[1, 1, 1\] is not accepted, only three numbers that add up to 4, half",
        ),
        ({"draft_vocab_size": -1}, f"draft_vocab_size -1 is not accepted, only 1 to {VOCAB}"),
    ],
)
def test_a_draft_that_cannot_be_trained_is_refused(tmp_path, draft, target, change, message):
    (draft / "config.json").write_text(json.dumps({**load_config(draft), **change}))
    with pytest.raises(CheckpointError, match=message):
        import_draft(draft, target, tmp_path / "taken")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"d2t": torch.zeros(32)}, "tensor d2t has dtype torch.float32; accepted are torch.int64"),
        ({"d2t": torch.full((32,), 10**9)}, "d2t and t2d disagree"),
        ({"d2t": torch.zeros(3, dtype=torch.int64)}, "tensor t2d is missing"),
        ({"norm.weight": torch.zeros(16, dtype=torch.float8_e4m3fn)}, "norm.weight has dtype torch.float8_e4m3fn"),
        ({"fc.weight": torch.zeros(16, 48, dtype=torch.int32)}, "fc.weight has dtype torch.int32; accepted are torch."),
    ],
)
def test_tensors_of_a_draft_from_elsewhere_may_be_rubbish(tmp_path, draft, target, changed, message):
    tensors = load_file(draft / "model.safetensors") | changed
    del tensors["t2d"]
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        import_draft(draft, target, tmp_path / "taken")


def test_versions_grow_and_old_ones_go(tmp_path, draft):
    folder = VersionFolder(tmp_path / "run")
    config, tensors = load_config(draft), load_file(draft / "model.safetensors")
    assert folder.newest() is None
    assert [folder.publish(config, tensors, keep=2) for _ in range(3)] == [1, 2, 3]
    assert folder.published() == [2, 3]
    with pytest.raises(CheckpointError):
        folder.adopt(tmp_path / "nowhere", keep=2)
    assert folder.newest() == 3
    folder.publish(config, tensors, keep=2, spared=[folder.path(2)])
    assert folder.published() == [2, 3, 4]
    assert (folder.number(folder.path(4)), folder.number(draft)) == (4, None)


def test_a_checkpoint_is_adopted_once(tmp_path, draft, target):
    folder = VersionFolder(tmp_path / "run")
    other = init_draft(str(target), tmp_path / "other", draft_vocab_size=32, seed=1)
    assert [folder.adopt(d, keep=3) for d in (draft, other, draft, other)] == [1, 2, 1, 2]
    change(other, **{"norm.weight": torch.full((16,), 2.0)})
    assert folder.adopt(other, keep=3) == 3


def test_versions_in_use_are_kept(tmp_path, draft):
    folder = VersionFolder(tmp_path / "run")
    config, tensors = load_config(draft), load_file(draft / "model.safetensors")
    for _ in range(4):
        folder.publish(config, tensors, keep=4)
    manifest = Manifest(pinned=[3])
    manifest.activated(2)
    manifest.activated(1)
    manifest.save(folder.root)
    for _ in range(2):
        folder.publish(config, tensors, keep=2)
    assert folder.published() == [1, 2, 3, 5, 6]
    assert folder.last_active() == 1
    shutil.rmtree(folder.path(1))
    assert folder.last_active() == 6
    (folder.root / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        folder.last_active()


def test_weights_that_changed_on_disk_are_refused(draft, target):
    change(draft, **{"norm.weight": torch.full((16,), 2.0)})
    with pytest.raises(CheckpointError, match="SHA-256"):
        check(draft, target)


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"{", b"3"])
def test_a_configuration_that_is_none_is_refused(tmp_path, draft, content):
    (draft / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        VersionFolder(tmp_path / "run").adopt(draft, keep=2)


def test_a_path_that_no_system_has_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="null byte"):
        VersionFolder(tmp_path / "run").adopt(tmp_path / "a\0b", keep=2)

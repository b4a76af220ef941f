import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_routing import LayerRouting, reference_routing, top_k_margin
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from moescope.clients.specimen import ARCHITECTURES, make_specimen
from moescope.clients.specimen_tokenizer import (
    BOS,
    EOS,
    PAD,
    ROLE_MARKERS,
    VOCAB_SIZE,
    build_tokenizer,
)
from moescope.tracer.errors import InputError

TOKENIZER = build_tokenizer()
TOKENS = np.random.default_rng(1).integers(len(TOKENIZER.all_special_ids), VOCAB_SIZE, 200).tolist()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Matrices this small gain nothing from threads, and waiting for them is slow on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model_dir(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("specimens") / request.param
    make_specimen(directory, request.param)
    return directory


def _routing(tmp_path: Path, arch: str) -> dict[int, LayerRouting]:
    make_specimen(tmp_path / arch, arch)
    return reference_routing(tmp_path / arch, TOKENS)


def _sets(ids: np.ndarray) -> list[frozenset[int]]:
    return [frozenset(row) for row in ids.tolist()]


# ------------------------------------------------------------------ the model


def test_routing_is_lively(model_dir):
    for routing in reference_routing(model_dir, TOKENS).values():
        num_experts, top_k = routing.scores.shape[1], routing.ids.shape[1]
        share = np.bincount(routing.ids.ravel(), minlength=num_experts) / routing.ids.size
        assert share.min() > 0.1 / num_experts
        assert -(share * np.log(share)).sum() / np.log(num_experts) > 0.9
        # Mixtral's 8 experts have but 28 pairs.
        assert len(set(_sets(routing.ids))) >= (25 if num_experts == 8 else 50)
        # Float noise is about 1e-6 here: a choice that hangs on it must be rare.
        margin = top_k_margin(routing.scores, top_k)
        assert np.median(margin) > 5e-3
        assert (margin < 1e-5).mean() < 0.02
        assert np.isfinite(routing.weights).all()
        assert routing.weights.std(axis=0).min() > 0.005


def test_routing_depends_on_context_and_not_only_on_the_token(model_dir):
    token, others = TOKENS[0], TOKENS[1:]
    repeated = [t for other in others[:50] for t in (other, token)]
    last = max(reference_routing(model_dir, repeated).items())[1]
    assert len(set(_sets(last.ids[1::2]))) > 5


def test_layers_keep_the_models_own_numbers(tmp_path, model_dir):
    first = 1 if "first_k_dense_replace" in ARCHITECTURES[model_dir.name] else 0
    assert list(reference_routing(model_dir, TOKENS[:4])) == list(range(first, 4))
    make_specimen(tmp_path / "gap", "qwen3_moe", mlp_only_layers=[1])
    assert list(reference_routing(tmp_path / "gap", TOKENS[:4])) == [0, 2, 3]


@pytest.mark.parametrize("arch", ["deepseek_v3", "glm4_moe"])
def test_the_correction_bias_changes_choices(tmp_path, arch):
    for layer, routing in _routing(tmp_path, arch).items():
        tensors = load_file(tmp_path / arch / "model.safetensors")
        bias = tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        plain = np.argsort(-(routing.scores - bias), axis=1)[:, : routing.ids.shape[1]]
        changed = np.mean([a != b for a, b in zip(_sets(plain), _sets(routing.ids), strict=True)])
        assert 0.05 < changed < 0.9


@pytest.mark.parametrize("arch", ["deepseek_v2_group", "deepseek_v3"])
def test_half_of_the_groups_are_left_out(tmp_path, arch):
    for routing in _routing(tmp_path, arch).values():
        in_group = np.isfinite(routing.scores).reshape(-1, 4, 4)
        assert (in_group.all(axis=2).sum(axis=1) == 2).all()
        assert (in_group.any(axis=2).sum(axis=1) == 2).all()


@pytest.mark.parametrize("arch", ["deepseek_v2", "deepseek_v2_group", "olmoe", "mixtral"])
def test_weights_are_without_the_routed_scaling_factor(tmp_path, arch):
    for routing in _routing(tmp_path, arch).values():
        total = routing.weights.sum(axis=1)
        assert (total <= 1 + 1e-6).all()
        assert np.allclose(total, 1) == (arch == "mixtral")


def test_checkpoint_names_one_tensor_per_expert(model_dir):
    names = load_file(model_dir / "model.safetensors").keys()
    down = (
        "block_sparse_moe.experts.7.w2"
        if model_dir.name == "mixtral"
        else "mlp.experts.7.down_proj"
    )
    assert f"model.layers.3.{down}.weight" in names
    assert not any(name.endswith("gate_up_proj") for name in names)


def test_equal_arguments_give_equal_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_specimen(tmp_path / name, seed=seed)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        *files
    }
    for file in files:
        content = (tmp_path / "a" / file).read_bytes()
        assert content == (tmp_path / "b" / file).read_bytes()
        assert (content == (tmp_path / "c" / file).read_bytes()) == (file != "model.safetensors")


def test_overrides_reach_the_config(tmp_path):
    make_specimen(tmp_path / "m", "olmoe", num_experts=4, num_experts_per_tok=2, vocab_size=1100)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert config["vocab_size"] == 1100
    assert config["dtype"] == "float32"


# -------------------------------------------------------------- the tokenizer


@settings(max_examples=100, deadline=None)
@given(st.text().filter(lambda text: "<|" not in text))  # a marker in the text is a marker
def test_any_text_survives(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_every_token_knows_its_characters():
    text = "The bridge — built in 1894 — was  closed;\n\tnobody knows why (naïve guess: 3.5% rust)."
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    covered = 0
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # Tokens of one character's bytes share its span; all others follow one another.
        assert start <= covered <= stop
        covered = stop
        if text[start:stop].isascii():
            assert TOKENIZER.decode([token]) == text[start:stop]
    assert covered == len(text)
    assert len(encoded["input_ids"]) < 0.6 * len(text)


def test_the_vocabulary_is_full_and_special_tokens_are_single():
    assert len(TOKENIZER) == VOCAB_SIZE
    for token in (PAD, BOS, EOS, *ROLE_MARKERS):
        (number,) = TOKENIZER(f"{token}", add_special_tokens=False)["input_ids"]
        assert number in TOKENIZER.all_special_ids


def test_the_saved_tokenizer_is_the_same(model_dir):
    # transformers picks tokenizer classes by model type: none may replace ours.
    loaded = AutoTokenizer.from_pretrained(model_dir)
    text = "Where did you leave the keys? 1, 2, 3…"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.chat_template == TOKENIZER.chat_template
    assert loaded.eos_token == EOS


def test_chat_template():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A specimen."},
        {"role": "user", "content": " And I? "},
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|begin|><|system|>Be short.<|end|><|user|>Who are you?<|end|>"
        "<|assistant|>A specimen.<|end|><|user|>And I?<|end|>"
    )
    prompted = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompted == text + "<|assistant|>"
    ids = TOKENIZER.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids.count(TOKENIZER.bos_token_id) == 1
    assert ids.count(TOKENIZER.eos_token_id) == 4


@pytest.mark.parametrize("roles", [["tool"], ["user", "system"]])
def test_chat_template_refuses_other_roles(roles):
    with pytest.raises(Exception, match=r"roles are system, user|stands first"):
        TOKENIZER.apply_chat_template([{"role": role, "content": "x"} for role in roles])


# ------------------------------------------------------------------ the errors


@pytest.mark.parametrize(
    ("arch", "overrides", "message"),
    [
        ("llama", {}, "llama.*deepseek_v2, .*mixtral"),
        ("olmoe", {"num_expert": 4}, "num_expert;"),
        ("olmoe", {"vocab_size": 100}, "at least 1024"),
        ("deepseek_v2", {"num_attention_heads": 7}, "sizes make no deepseek_v2"),
        ("qwen3_moe", {"hidden_size": "wide"}, "sizes make no qwen3_moe"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path, arch, overrides, message):
    with pytest.raises(InputError, match=message):
        make_specimen(tmp_path / "new" / "m", arch, **overrides)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(TOKENIZER), "save_pretrained", fail)
    with pytest.raises(InputError, match="no space left"):
        make_specimen(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_what_stands_there_is_kept_unless_forced(tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    make_specimen(target, "olmoe")  # an empty directory is fine
    (target / "extra").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        make_specimen(target, "mixtral")
    assert (target / "extra").exists()
    make_specimen(target, "mixtral", force=True)
    assert not (target / "extra").exists()
    assert json.loads((target / "config.json").read_text())["model_type"] == "mixtral"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_force_deletes_only_models(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="no model"):
        make_specimen(tmp_path, force=True)
    with pytest.raises(InputError, match=r"not empty|no model"):
        make_specimen(tmp_path / "thesis.txt", force=True)
    assert (tmp_path / "thesis.txt").read_text() == "x"

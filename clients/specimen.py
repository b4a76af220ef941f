"""Make a tiny mixture-of-experts model with random weights, so that everything runs offline.

A *specimen* is a model directory of a few megabytes that transformers and vLLM load like any
other: the real architecture's code paths with a toy's sizes. Its text means nothing, but its
routing is lively: the router's scores spread wide, so experts change from token to token and a
choice rarely hangs on float noise. That is what tests of tracing and of masks need.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moescope.clients.specimen_tokenizer import MAX_POSITIONS, VOCAB_SIZE, build_tokenizer
from moescope.tracer.errors import InputError

_LATENT_ATTENTION = {
    # vLLM's latent-attention kernels for CPUs are compiled for these two sizes and no other.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    # YaRN, as in the released DeepSeek models, and here for one more reason: with plain rotary
    # embeddings vLLM 0.32 on a CPU computes wrong attention. Its rotary kernel takes the stride
    # between heads for the one between tokens when queries come as [tokens, heads, size], which
    # only latent attention does; for YaRN it uses torch, which is right.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": MAX_POSITIONS // 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}

_COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_SHARED_EXPERT = {
    "intermediate_size": 256,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_DEEPSEEK = {**_COMMON, **_LATENT_ATTENTION, **_SHARED_EXPERT, "num_key_value_heads": 4}
_SIGMOID = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    # Without this transformers counts one multi-token-prediction layer, which has no weights here.
    "num_nextn_predict_layers": 0,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        **_DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "greedy",
        # vLLM groups whatever `topk_method` says: one group is what makes it greedy there.
        "n_group": 1,
        "topk_group": 1,
        # transformers ignores this and vLLM obeys it, so only False gives both the same weights.
        "norm_topk_prob": False,
    },
    "deepseek_v2_group": {
        "model_type": "deepseek_v2",
        **_DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **_DEEPSEEK,
        **_SIGMOID,
        "q_lora_rank": 64,
        "n_group": 4,
        "topk_group": 2,
        # transformers knows no other router here; vLLM reads these two names from the config.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        **_COMMON,
        **_SHARED_EXPERT,
        **_SIGMOID,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "use_qk_norm": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_COMMON,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,  # of dense layers, which only `mlp_only_layers` brings in
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "olmoe": {
        "model_type": "olmoe",
        **_COMMON,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_COMMON,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}


def make_specimen(
    directory: Path,
    arch: str = "deepseek_v2",
    seed: int = 0,
    *,
    force: bool = False,
    **overrides: Any,
) -> None:
    """Write a random-weight model and its tokenizer to `directory`, whole or not at all.

    `arch` names an entry of `ARCHITECTURES`; `overrides` replace fields of its configuration, by
    transformers' names. Weights are float32, and equal arguments give equal bytes. `force`
    replaces a model that stands there. Raises InputError for an unknown `arch` or field, and for
    a directory that holds something.
    """
    fields = _fields(arch, overrides)
    check_target(directory, force)
    tokenizer = build_tokenizer()
    write_model(directory, _build_model(fields, tokenizer, seed), tokenizer, force=force)


def write_model(
    directory: Path,
    model: Any,
    tokenizer: Any,
    *,
    force: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a model, its tokenizer and what `finish` adds to the folder, whole or not at all."""
    directory = directory.resolve()
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
        _save_quietly(model, aside)
        tokenizer.save_pretrained(aside)
        if finish is not None:
            finish(aside)
        if force and directory.exists():
            shutil.rmtree(directory)
        # A rename may land on an empty directory or on nothing: files that came there meanwhile
        # make it fail, and stay.
        aside.rename(directory)
    except OSError as error:
        raise InputError(f"cannot write the model to {directory}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fields(arch: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's fields, or InputError that names what doesn't exist."""
    if arch not in ARCHITECTURES:
        raise InputError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHITECTURES)}")
    from transformers import AutoConfig

    fields = ARCHITECTURES[arch]
    known = AutoConfig.for_model(fields["model_type"])
    if unknown := [name for name in overrides if name not in fields and not hasattr(known, name)]:
        raise InputError(
            f"{arch} has no configuration field {', '.join(unknown)}; "
            "use the names that transformers gives them"
        )
    if overrides.get("vocab_size", VOCAB_SIZE) < VOCAB_SIZE:
        raise InputError(f"vocab_size must be at least {VOCAB_SIZE}, the tokenizer's size")
    return {"vocab_size": VOCAB_SIZE, **fields, **overrides}


def check_target(directory: Path, force: bool) -> None:
    """Raise InputError unless `directory` may be written (and, with `force`, replaced)."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not force:
        raise InputError(f"{directory} exists and is not empty; choose another, or force it")
    # `force` deletes the whole directory, so it must be what we would put there.
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} holds no model (no config.json), so it is not overwritten")


def _build_model(fields: Mapping[str, Any], tokenizer: Any, seed: int) -> Any:
    """A causal language model of these fields, in memory, its weights drawn from `seed`."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(
            **fields,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"these sizes make no {fields['model_type']} model: {error}") from error
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            tensor.copy_(torch.from_numpy(_weights(name, tuple(tensor.shape), rng)))
    return model


def _weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random float32 values for one tensor, drawn by numpy: the same bytes on every processor.

    Matrices ([..., out, in]) keep a unit-variance input at unit variance, but for two: router
    scores have to spread, and queries have to be choosy. Attention that averages over all tokens
    tells each the same, and routing would then depend on the token and little else. Larger
    still, they would turn rounding into other experts: a step to bfloat16 now changes 1 in 20.
    """
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("e_score_correction_bias"):
        return np.float32(0.1) * noise  # against scores of 0.3 spread: it decides, but not alone
    if name.endswith("embed_tokens.weight"):
        return noise
    # Where queries are normalised, the projection's gain is lost and the norm's counts.
    spread = ("gate.weight", "lm_head.weight", "q_proj.weight", "q_b_proj.weight", "q_norm.weight")
    gain = np.float32(2 if name.endswith(spread) else 1)
    if name.endswith("norm.weight"):
        return gain * (1 + np.float32(0.1) * noise)
    return gain / np.float32(shape[-1] ** 0.5) * noise


def _save_quietly(model: Any, folder: Path) -> None:
    """Save without transformers' progress bar, which a few megabytes don't need."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()

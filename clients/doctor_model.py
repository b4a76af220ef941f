"""What `moescope doctor` reads from a model's configuration: whether and how much it routes."""

from pathlib import Path
from typing import Any

from moescope.clients.doctor import Check
from moescope.tracer.format import MoeShape

# The names of the same numbers in the families' configurations.
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")


def check_model(model: str) -> tuple[Check, MoeShape | None]:
    """Whether the model has routed experts; its shape, as far as the configuration says it."""
    from transformers import PretrainedConfig

    remedy = "name a folder with a config.json, or a model of the hub that this machine reaches"
    if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        return Check("model", "fail", f"{model}: no such folder", remedy), None
    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except Exception as error:  # whatever a hub, a proxy or a file may come up with
        said = str(error).strip().splitlines()
        found = f"{model}: {said[0] if said else type(error).__name__}"
        return Check("model", "fail", found, remedy), None
    config = config.get("text_config", config)
    experts, top_k = _first(config, _EXPERTS), _first(config, _TOP_K)
    if not experts or not top_k:
        remedy = "name a mixture-of-experts model; if it is one, ignore this"
        found = f"{model}: the configuration names no routed experts"
        return Check("model", "fail", found, remedy), None
    shape = MoeShape(tuple(_moe_layers(config)), experts, top_k)
    found = f"{model}: {len(shape.layers)} MoE layers, top-{top_k} of {experts} experts"
    return Check("model", "ok", found), shape


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def _moe_layers(config: dict[str, Any]) -> list[int]:
    dense, every = config.get("first_k_dense_replace") or 0, config.get("moe_layer_freq") or 1
    step = config.get("decoder_sparse_step") or 1
    return [
        layer
        for layer in range(config.get("num_hidden_layers") or 0)
        if layer >= dense
        and (not isinstance(every, int) or layer % every == 0)
        and (layer + 1) % step == 0
        and layer not in (config.get("mlp_only_layers") or ())
    ]

"""What the GPU benchmark measures, and where: workloads, arms, engines, and which go on which card.

An *arm* is a way of running a workload; an *engine* is a process that can run some arms. Every
card has a plain engine, and beside it as many others as fit: those make a *phase*.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30
# How a unit is timed. Older rounds of an arm are shown until it is measured under a new number.
#   1  arms in turn, each at once after the other
#   2  in random order, after a warm-up; replicas begin together
METHOD = 2


@dataclass(frozen=True)
class Workload:
    """`count` sequences at once, with `prompt` tokens in and `output` tokens out each."""

    count: int
    prompt: int
    output: int

    @property
    def tokens(self) -> int:
        """Tokens that are computed, and so traced: the last output token is not."""
        return self.count * (self.prompt + self.output - 1)

    def __str__(self) -> str:
        return f"{self.count} x ({self.prompt} in, {self.output} out)"


WORKLOADS = {
    "prefill": Workload(128, 512, 1),
    "mixed": Workload(256, 128, 128),
    "decode-256": Workload(256, 16, 128),
    "decode-64": Workload(64, 16, 128),
    "decode-16": Workload(16, 16, 128),
    "decode-1": Workload(1, 16, 128),
}
CPU_WORKLOADS = {
    "prefill": Workload(16, 64, 1),
    "mixed": Workload(64, 110, 12),  # more rows than the smallest ring has: `drop` has to drop
    "decode-256": Workload(16, 8, 12),
    "decode-1": Workload(1, 8, 12),
}
# One sequence at a time is slow: an arm that works so runs these many.
ONE_AT_A_TIME = {"prefill": 8, "mixed": 1, "decode-256": 1}
LEAST_UNIT_S = 1.0  # shorter workloads are repeated within one timed unit


@dataclass(frozen=True)
class Arm:
    """A way of running a workload, on an engine of its kind."""

    engine: str
    meaning: str
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    overhead_s: float = 0.1  # beside the timed part, for the estimate


ARMS = {
    "plain": Arm("plain", "vLLM without the plugin"),
    "again": Arm("again", "vLLM without the plugin, a second process: what is noise"),
    "idle": Arm("ours", "moescope installed, nothing asked of it"),
    "traced": Arm("ours", "every request traced to Parquet", overhead_s=1.6),
    "tenth": Arm(
        "ours",
        "every tenth request traced to Parquet",
        ("prefill", "mixed", "decode-256"),
        1.6,
    ),
    "drop": Arm(
        "ours",
        'every request traced, policy="drop", the smallest ring, the writer stopped',
        ("mixed",),
        2.0,
    ),
    "steerable": Arm("steerable", "MOESCOPE_STEER=on, no mask"),
    "masks": Arm("steerable", "8 masks in each batch that leave the experts as they are"),
    "both": Arm("steerable", "8 masks, and every request traced", overhead_s=1.7),
    "capture": Arm("capture", "vLLM's own enable_return_routed_experts"),
    "steermoe": Arm(
        "steermoe",
        "as SteerMoE does: eager, one sequence at a time, a .npy file a layer and step",
        tuple(ONE_AT_A_TIME),
    ),
}

# Their environment. In this order they are dealt to the cards.
ENGINES: dict[str, dict[str, str]] = {
    "plain": {"VLLM_PLUGINS": ""},
    "ours": {"VLLM_PLUGINS": "moescope", "MOESCOPE_STEER": "auto"},
    "steerable": {"VLLM_PLUGINS": "moescope", "MOESCOPE_STEER": "on"},
    "again": {"VLLM_PLUGINS": ""},
    "capture": {"VLLM_PLUGINS": ""},
    "steermoe": {"VLLM_PLUGINS": ""},
}

# What an engine takes beside weights and KV: context, CUDA graphs, activations of a full step.
_OVERHEAD_GIB = 3.5
# Guesses, for the estimate: tokens a second of DeepSeek-V2-Lite on an H100, and starts.
_RATES = {
    "prefill": 82_000,
    "mixed": 30_000,
    "decode-256": 18_000,
    "decode-64": 7_000,
    "decode-16": 2_200,
    "decode-1": 200,
}
FIRST_START_S, LATER_START_S = 170.0, 90.0


@dataclass(frozen=True)
class Shape:
    """A model's sizes, from its config.json, perhaps with fewer layers than it has."""

    folder: Path
    layers: int
    all_layers: int
    kv_bytes: int  # of one token
    weight_bytes: int  # in bfloat16

    @property
    def name(self) -> str:
        """For people."""
        cut = "" if self.layers == self.all_layers else f", {self.layers} of its layers"
        return f"{self.folder.name}{cut}"

    @property
    def kv_cache_bytes(self) -> int:
        """Room for the largest workload, all of its sequences at once, and a twentieth more."""
        tokens = max(w.count * (w.prompt + w.output) for w in WORKLOADS.values())
        return int(1.05 * tokens * self.kv_bytes) + (64 << 20)

    @property
    def engine_gib(self) -> float:
        """What one engine takes of a card."""
        return (self.weight_bytes + self.kv_cache_bytes) / GIB + _OVERHEAD_GIB


def read_shape(folder: Path, layers: int | None, card_gib: float) -> Shape:
    """The shape of a config folder; with `layers` None, as many as let two engines fit."""
    config = json.loads((folder / "config.json").read_text())
    full = config["num_hidden_layers"]
    for count in [layers] if layers else range(full, 0, -1):
        shape = _sizes(folder, config, count)
        if layers or 2 * shape.engine_gib <= card_gib:
            return shape
    raise SystemExit(f"two engines of {folder} do not fit on a card of {card_gib:.0f} GiB")


def _sizes(folder: Path, config: dict[str, Any], layers: int) -> Shape:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    if rank := config.get("kv_lora_rank"):
        kv = 2 * (rank + config["qk_rope_head_dim"])
        attention = hidden * heads * 2 * (config["qk_nope_head_dim"] + config["v_head_dim"])
    else:
        kv = 2 * 2 * config["num_key_value_heads"] * head
        attention = 2 * hidden * head * (heads + config["num_key_value_heads"])
    experts = config.get("n_routed_experts") or config.get("num_experts", 1)
    experts += config.get("n_shared_experts") or 0
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    weights = (
        layers * (attention + experts * 3 * hidden * width) + 2 * hidden * config["vocab_size"]
    )
    return Shape(folder, layers, config["num_hidden_layers"], layers * kv, 2 * weights)


@dataclass(frozen=True)
class Phase:
    """Engines that stand on a card at the same time, a plain one first."""

    card: int
    engines: tuple[str, ...]
    first: bool

    def arms(self, wanted: list[str], workload: str) -> list[str]:
        """The wanted arms of a workload that these engines run."""
        return [
            name
            for name in wanted
            if ARMS[name].engine in self.engines and workload in ARMS[name].workloads
        ]


def plan(shape: Shape, cards: list[int], card_gib: float, wanted: list[str]) -> list[list[Phase]]:
    """For every card, its phases; the cards work at the same time."""
    others = [e for e in ENGINES if e != "plain" and any(ARMS[a].engine == e for a in wanted)]
    room = int(card_gib // shape.engine_gib) - 1
    if room < 1:
        raise SystemExit(
            f"{shape.name}: an engine takes {shape.engine_gib:.0f} GiB, so that two do not fit on "
            f"a card of {card_gib:.0f} GiB: give fewer --layers"
        )
    plans = []
    for index, card in enumerate(cards):
        mine = others[index :: len(cards)]
        plans.append(
            [
                Phase(card, ("plain", *mine[at : at + room]), first=not at)
                for at in range(0, len(mine), room)
            ]
        )
    return [phases for phases in plans if phases]


def unit_seconds(arm: str, workload: str) -> float:
    """A guess of what one timed unit takes."""
    if arm == "steermoe":
        w = WORKLOADS[workload]
        return ONE_AT_A_TIME[workload] * w.output * 0.045
    seconds = WORKLOADS[workload].tokens / _RATES[workload]
    return seconds * max(1, math.ceil(LEAST_UNIT_S / seconds)) + ARMS[arm].overhead_s


def describe(
    shape: Shape, plans: list[list[Phase]], wanted: list[str], workloads: list[str], rounds: int
) -> tuple[list[str], float]:
    """The plan of a shape in lines, and the seconds that it may take."""
    lines = [
        f"{shape.name}: {shape.engine_gib:.1f} GiB an engine "
        f"({shape.weight_bytes / GIB:.1f} weights, {shape.kv_cache_bytes / GIB:.1f} KV)"
    ]
    longest = 0.0
    for phases in plans:
        whole = 0.0
        for phase in phases:
            start = FIRST_START_S if phase.first else LATER_START_S
            arms = [(arm, w) for w in workloads for arm in phase.arms(wanted, w)]
            one = sum(unit_seconds(arm, workload) for arm, workload in arms)
            seconds = start + (rounds + 1) * one
            whole += seconds
            lines.append(
                f"  card {phase.card}: {' + '.join(phase.engines):34} start {start:.0f} s, "
                f"1 + {rounds} rounds of {one:.0f} s: {seconds / 60:.1f} min"
            )
        longest = max(longest, whole)
    return lines, longest

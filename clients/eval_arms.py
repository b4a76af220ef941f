"""The arms of an evaluation: without a mask, steered, reversed, and random experts as control.

A *dose* is how many experts, and what is done to them: "n4/deactivate". The headline dose has the
arms base, steered, reverse, random-0, random-1, ...; every other one is a point of the dose curve,
"steered/n8/scale-0.5", "reverse/...", "random-0/...".
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from moescope.clients.mask_files import mask_from_rd, random_mask
from moescope.tracer.errors import InputError
from moescope.tracer.mask_format import Mask, Mode

Role = Literal["base", "steered", "reverse", "random"]

MAX_LOSS = 0.02  # of utility, as a share: two points
_STRENGTHS = "deactivate, activate, scale-0.75, scale-0.5, scale-0.25 or scale-0"
_SCALE = re.compile(r"scale-(\d+(?:\.\d+)?)")
_DOSE = re.compile(r"n(\d+)/(.+)")


@dataclass(frozen=True, slots=True)
class Dose:
    """So many experts, and what is done to them."""

    experts: int
    strength: str

    def __str__(self) -> str:
        return f"n{self.experts}/{self.strength}"

    @property
    def force(self) -> float:
        """How much is done to an expert, from 0 to 1, to tell doses of as many experts apart."""
        factor = _factor(self.strength)
        return 1.0 if factor is None else 0.99 * (1 - factor)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the model; `mask` is None for the base alone.

    `key` is its name in files and on servers, whichever dose is the headline.
    """

    role: Role
    dose: Dose | None = None
    seed: int | None = None
    mask: Mask | None = None

    @property
    def key(self) -> str:
        """Such as "random-0.n4.scale-0.5"."""
        return (
            self._role
            if self.dose is None
            else f"{self._role}.n{self.dose.experts}." + (self.dose.strength)
        )

    @property
    def _role(self) -> str:
        return self.role if self.seed is None else f"{self.role}-{self.seed}"

    def id(self, headline: Dose) -> str:
        """The arm's name in an evaluation."""
        return self._role if self.dose in (None, headline) else f"{self._role}/{self.dose}"

    @property
    def sha256(self) -> str | None:
        """Of the mask's JSON."""
        return (
            None if self.mask is None else hashlib.sha256(self.mask.to_json().encode()).hexdigest()
        )

    def about(self, headline: Dose) -> dict[str, Any]:
        """For eval.json. `direction`: towards the ranking's positive condition or away from it."""
        direction = {"steered": "positive", "reverse": "negative"}.get(self.role)
        return {
            "arm": self.id(headline),
            "role": self.role,
            "experts": self.dose.experts if self.dose else None,
            "strength": self.dose.strength if self.dose else None,
            "direction": direction,
            "seed": self.seed,
            "mask": self.mask.model_dump(mode="json", exclude_none=True) if self.mask else None,
            "mask_sha256": self.sha256,
        }


BASE_ARM = Arm("base")


def parse_doses(experts: str, strengths: str) -> list[Dose]:
    """All pairs of "1,2,4,8" and "deactivate,scale-0.5"; InputError says what is wrong in them."""
    counts = []
    for text in experts.split(","):
        number = int(text) if text.strip().isdecimal() else 0
        if number < 1:
            raise InputError(
                f"--experts {experts}: {text.strip()!r} is no number of experts: give 1 or more, "
                "such as 1,2,4,8"
            )
        counts.append(number)
    kinds = [_strength(text.strip(), f"--strengths {strengths}") for text in strengths.split(",")]
    return [Dose(number, kind) for kind in dict.fromkeys(kinds) for number in dict.fromkeys(counts)]


def parse_dose(text: str) -> Dose:
    """A dose as it is written: "n4/deactivate"."""
    match = _DOSE.fullmatch(text.strip())
    if match is None or int(match[1]) < 1:
        raise InputError(f"--headline {text}: write a dose, such as n4/deactivate")
    return Dose(int(match[1]), _strength(match[2], f"--headline {text}"))


def _strength(text: str, where: str) -> str:
    factor = _factor(text)
    if text not in ("deactivate", "activate") and (factor is None or factor >= 1):
        raise InputError(f"{where}: {text!r} is no strength: use {_STRENGTHS}")
    return text if factor is None else f"scale-{factor:g}"


def _factor(strength: str) -> float | None:
    match = _SCALE.fullmatch(strength)
    return None if match is None else float(match[1])


def steering_arms(
    ranking: pa.Table, doses: Sequence[Dose], mode: Mode = "hard"
) -> dict[Dose, tuple[Arm, Arm]]:
    """The arms `steered` and `reverse` of each dose; InputError names a dose that has none.

    `mode`: what a mask's actions mean (docs/masks.md); "steermoe" knows no scale.
    """
    for dose in doses:
        if mode == "steermoe" and _factor(dose.strength) is not None:
            raise InputError(
                f"--mode steermoe with the dose {dose}: SteerMoE's masks switch experts on and off "
                "alone; give --strengths deactivate or activate, or --mode hard"
            )
    return {
        dose: (_steer(ranking, dose, mode), _steer(ranking, dose, mode, reverse=True))
        for dose in doses
    }


def _steer(ranking: pa.Table, dose: Dose, mode: Mode, *, reverse: bool = False) -> Arm:
    role: Role = "reverse" if reverse else "steered"
    arm = Arm(role, dose)
    number = "activate" if dose.strength == "activate" else "deactivate"
    try:
        mask = mask_from_rd(
            ranking,
            name=arm.key,
            scale=_factor(dose.strength),
            reverse=reverse,
            mode=mode,
            **{number: dose.experts},  # type: ignore[arg-type]  # the two are counts
        )
    except InputError as error:
        raise InputError(f"dose {dose}, {role}: {error}") from None
    if len(mask.entries) < dose.experts:
        raise InputError(
            f"dose {dose}, {role}: the ranking gives only {len(mask.entries)} experts ({mask.note})"
            ": choose fewer with --experts"
        )
    # The ranking and its settings stand in eval.json, once.
    source = {"selection": (mask.source or {}).get("selection")}
    return Arm(role, dose, None, mask.model_copy(update={"source": source}))


def random_arms(like: Arm, num: int) -> list[Arm]:
    """Controls of `like`: as many experts of each layer, drawn by seeds 0, 1, ..."""
    assert like.mask is not None
    arms = []
    for seed in range(num):
        arm = Arm("random", like.dose, seed)
        mask = random_mask(like.mask, seed, name=arm.key)
        arms.append(Arm("random", like.dose, seed, mask))
    return arms


def plan(
    steering: dict[Dose, tuple[Arm, Arm]], headline: Dose, num_random: int, num_random_dose: int
) -> list[Arm]:
    """All arms, the headline's first; `num_random_dose` are the controls of every other dose."""
    arms = [BASE_ARM]
    for dose in sorted(steering, key=lambda dose: dose != headline):
        number = num_random if dose == headline else num_random_dose
        arms += [*steering[dose], *random_arms(steering[dose][0], number)]
    return arms


@dataclass(frozen=True, slots=True)
class Tuned:
    """What the tuning items say of one dose: the main metric, utility, and their changes."""

    dose: Dose
    value: float
    gain: float
    utility: float
    loss: float


def choose(tuned: Sequence[Tuned]) -> tuple[Dose, str]:
    """The headline dose, and the rule that chose it in words.

    The largest gain among doses that lose at most two points of utility; of equal ones the
    gentlest. If all lose more, the one that loses least.
    """
    allowed = [t for t in tuned if t.loss <= MAX_LOSS + 1e-9]
    if not allowed:
        least = min(tuned, key=lambda t: (t.loss, -t.gain, t.dose.experts, t.dose.force))
        return (
            least.dose,
            "least loss of utility on the tuning items: every dose loses over 2 points",
        )
    best = min(allowed, key=lambda t: (-round(t.gain, 9), t.dose.experts, t.dose.force))
    return best.dose, "largest gain on the tuning items at a loss of utility of at most 2 points"

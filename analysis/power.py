"""How many examples an effect of a given size needs: the t test's power, as a guide.

The tests of inference.py have no closed form; that of a mean is close to the t test's.
"""

from dataclasses import dataclass

from scipy.optimize import brentq
from statsmodels.stats.power import TTestIndPower, TTestPower

POWER = 0.8
EFFECTS = (0.2, 0.5, 0.8)  # small, medium and large in Cohen's words

_MOST_EXAMPLES = 1 << 30


@dataclass(frozen=True, slots=True)
class Power:
    """What a design can find, two-sided, at a level.

    `needed`: examples (pairs, or of each condition) for each of the effects; `detectable`: the
    smallest effect that the examples there are would find, None with too few to say.
    """

    level: float
    power: float
    needed: dict[str, int]
    detectable: float | None


def power_note(examples: tuple[int, int], *, paired: bool, level: float) -> Power:
    """The power of a design with so many examples of each condition; of pairs both are the same."""
    needed = {str(effect): _examples_needed(effect, paired, level) for effect in EFFECTS}
    detectable = None
    if min(examples) >= 3:

        def lacking(effect: float) -> float:
            return _power(effect, examples, paired, level) - POWER

        largest = 0.001
        while lacking(largest) < 0:
            largest *= 2
        detectable = float(brentq(lacking, 0, largest))
    return Power(level, POWER, needed, detectable)


def _power(effect: float, examples: tuple[int, int], paired: bool, level: float) -> float:
    """Of finding an effect on its own side; the other adds nothing, and is NaN far from it."""
    side = {"alpha": level / 2, "alternative": "larger"}
    if paired:
        return float(TTestPower().power(effect, examples[0], **side))
    ratio = examples[1] / examples[0]
    return float(TTestIndPower().power(effect, examples[0], ratio=ratio, **side))


def _examples_needed(effect: float, paired: bool, level: float) -> int:
    """The fewest examples whose power is enough.

    By halving, since statsmodels' `solve_power` gives wrong roots at levels like 0.05 / 1,664.
    """
    low, high = 2, 4
    while _power(effect, (high, high), paired, level) < POWER and high < _MOST_EXAMPLES:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _power(effect, (middle, middle), paired, level) < POWER:
            low = middle
        else:
            high = middle
    return high

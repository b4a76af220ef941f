"""What every replica is to have, and the steps that bring one there.

A replica's server numbers masks by itself, as any server does. It gets every version in its order,
so its numbers are the registry's: "calm@2" is one mask on all of them, or the replica is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from moescope.server.audit import State, split_key
from moescope.tracer.errors import StoreError

What = Literal["put", "delete", "steer", "start", "stop"]


@dataclass(frozen=True, slots=True)
class Target:
    """The masks and the global mask (`state`), and the run that takes requests which name none."""

    state: State
    run: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One change of one server.

    `name` is the key of a mask that is put ("calm@2"), the name that is deleted, the key of the
    global mask (None: none), or a run. `mask` is the mask that is put, as JSON.
    """

    what: What
    name: str | None
    mask: dict[str, Any] | None = None


def apply(have: Target, step: Step) -> Target:
    """What a server has after the step."""
    state, name = have.state, step.name or ""
    match step.what:
        case "put":
            return replace(have, state=state.put(*split_key(name)))
        case "delete":
            return replace(have, state=state.delete(name))
        case "steer":
            return replace(have, state=state.steer(step.name))
        case "start":
            return replace(have, run=step.name)
        case "stop":
            return replace(have, run=None)


def steps_between(
    have: Target, want: Target, mask: Callable[[str, int], dict[str, Any]]
) -> list[Step]:
    """The steps from one to the other; `mask` gives a version as JSON, also one that was deleted.

    StoreError if there are none: the server has versions that the registry has not.
    """
    steps: list[Step] = []
    state = have.state
    for name in sorted(state.latest.keys() | want.state.latest.keys()):
        steps += _steps_of_mask(name, state, want.state, mask)
    deleted = {step.name for step in steps if step.what == "delete"}
    if state.steering is not None and split_key(state.steering)[0] in deleted:
        # A server does not delete its global mask.
        steps.insert(0, Step("steer", None))
    if have.run is not None and have.run != want.run:
        steps.append(Step("stop", have.run))
    reached = have
    for step in steps:
        reached = apply(reached, step)
    if reached.state.steering != want.state.steering:
        steps.append(Step("steer", want.state.steering))
    if want.run is not None and want.run != reached.run:
        steps.append(Step("start", want.run))
    return steps


def _steps_of_mask(
    name: str, have: State, want: State, mask: Callable[[str, int], dict[str, Any]]
) -> list[Step]:
    first, last = have.latest.get(name, 0), want.latest.get(name, 0)
    gone, gone_after = have.deleted.get(name, 0), want.deleted.get(name, 0)
    if first > last or gone > gone_after or gone < gone_after < first:
        raise StoreError(
            f"the replica's mask {name} is not as the registry has it: was the folder of masks "
            "changed or put back while replicas ran?"
        )
    steps = [Step("delete", name)] if gone < gone_after == first else []
    gone = max(gone, first if steps else 0)
    for version in range(first + 1, last + 1):
        data = mask(name, version)
        if version - 1 > gone and data == mask(name, version - 1):
            # A server takes the same mask again for no new version, unless its name was deleted
            # in between: so it was.
            steps.append(Step("delete", name))
            gone = version - 1
        steps.append(Step("put", f"{name}@{version}", data))
        if version == gone_after:
            steps.append(Step("delete", name))
            gone = version
    return steps


def concerns(before: Target, after: Target) -> frozenset[str] | None:
    """The names of masks that a change is about; None if it is about every request."""
    old, new = before.state, after.state
    if old.steering != new.steering or before.run != after.run:
        return None
    names = old.latest.keys() | new.latest.keys()
    return frozenset(name for name in names if old.current(name) != new.current(name))

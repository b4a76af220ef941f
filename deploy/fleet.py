"""The replicas that serve, and how a change comes to all of them at once.

    bring(change)   1. prepare   every replica gets the new masks, and lets requests that the change
                                 is about wait
                    2. commit    every replica puts the change in force, and goes on

So no request starts under the old state after one has started under the new. A replica that does
not confirm a phase is out: it takes no request until it has caught up (`enter`).

How can one be out that can't be told so? By leases. A replica asks for orders all the time
(`follow`), and each answer lets it serve for `lease_s` more; when it hears nothing it stops by
itself. A change waits for that before it is said to be in force. A coordinator that has just
started does not know who holds a lease of the one before, so its first change waits `lease_s`.

Knows nothing of Ray: replicas call the methods, in whatever way.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

from moescope.deploy.target import Step, Target, concerns, steps_between
from moescope.tracer.errors import MoescopeError

logger = logging.getLogger("moescope")

POLLS_PER_LEASE = 4
_MAX_OUT = 64

MaskJson = Callable[[str, int], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Order:
    """What a replica is to do.

    prepare   apply `steps`, and let the requests wait that name one of `names` (None: all)
    commit    apply `steps`; then the server has `target`, and requests go on
    report    answer with the pages that `names` are the paths of
    """

    number: int
    what: Literal["prepare", "commit", "report"]
    steps: tuple[Step, ...] = ()
    names: frozenset[str] | None = None
    target: Target | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an order; `why` it failed, None if it did not."""

    number: int
    why: str | None = None
    pages: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """The answer to a replica that wants to serve.

    `ticket` is given to one that has what it must; other ones get the steps to there. Another
    coordinator does not know it.
    """

    ticket: str | None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Reach:
    """Which replicas have what is in force now, and why the others have not."""

    expected: int
    reached: list[str]
    not_reached: dict[str, str]

    @property
    def all(self) -> bool:
        """Whether every replica that there should be has it."""
        return not self.not_reached and len(self.reached) >= self.expected

    def to_json(self) -> dict[str, Any]:
        """As answers say it."""
        return {
            "expected": self.expected,
            "reached": self.reached,
            "not_reached": [
                {"replica": replica, "why": why} for replica, why in self.not_reached.items()
            ],
        }


@dataclass(eq=False)
class Member:
    """A replica that serves. `lease_end`: until then it does so, whatever happens to us."""

    ticket: str
    replica: str
    have: Target
    lease_end: float
    orders: "asyncio.Queue[Order]" = field(default_factory=asyncio.Queue)
    waiting: "dict[int, asyncio.Future[Answer]]" = field(default_factory=dict)


class Fleet:
    """The members, and what is in force.

    Args:
        target: what is in force now.
        mask: gives a version of a mask as JSON.
        expected: how many replicas there should be.
        lease_s: for how long a replica serves without hearing of us.

    """

    def __init__(self, target: Target, mask: MaskJson, expected: int, lease_s: float) -> None:
        self.target, self.expected, self.lease_s = target, expected, lease_s
        self._mask = mask
        self._members: dict[str, Member] = {}
        self._out: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._changing = asyncio.Lock()
        self._first_change = time.monotonic() + lease_s

    # What replicas call.

    def join(self, replica: str) -> None:
        """It begins to start."""
        self._put_out(replica, "it is starting, and gets the change before it serves")

    async def enter(self, replica: str, have: Target) -> Entry:
        """Let it serve if it has what is in force; else say what it lacks."""
        async with self._changing:
            try:
                steps = steps_between(have, self.target, self._mask)
            except MoescopeError as error:
                self._put_out(replica, str(error))
                raise
            if steps:
                return Entry(None, tuple(steps))
            for member in [m for m in self._members.values() if m.replica == replica]:
                self._forget(member)
            member = Member(uuid4().hex, replica, have, time.monotonic() + self.lease_s)
            self._members[member.ticket] = member
            self._out.pop(replica, None)
            if len(self._members) >= self.expected:
                self._out.clear()  # others have taken the place of those that ended
            logger.info("replica %s serves", replica)
            return Entry(member.ticket)

    async def follow(self, ticket: str, answer: Answer | None) -> Order | bool:
        """The next order for this member, True if there is none for now; False if it is out."""
        member = self._members.get(ticket)
        if member is None:
            return False
        if answer is not None:
            future = member.waiting.pop(answer.number, None)
            if future is not None and not future.done():
                future.set_result(answer)
        order: Order | bool = True
        with suppress(TimeoutError):
            order = await asyncio.wait_for(member.orders.get(), self.lease_s / POLLS_PER_LEASE)
        if ticket not in self._members:
            return False
        member.lease_end = time.monotonic() + self.lease_s
        return order

    def leave(self, replica: str, why: str) -> None:
        """It serves no more."""
        for member in [m for m in self._members.values() if m.replica == replica]:
            self._drop(member, why)
        self._put_out(replica, why)

    # What the control plane calls.

    def adopt_run(self, run: str | None) -> None:
        """Go on with a run that replicas have from the coordinator before."""
        self.target = replace(self.target, run=run)

    async def bring(
        self,
        change: Callable[[Target], Target],
        vet: Callable[[list[Answer]], None] | None = None,
    ) -> None:
        """Bring a change to all members, and leave out those that do not confirm it.

        Args:
            change: what is to be in force, of what is.
            vet: looks at what members say to the first phase; if it raises, nothing is changed.

        """
        # Not given up half way when the client goes that has asked for it.
        await asyncio.shield(asyncio.create_task(self._bring(change, vet)))

    async def _bring(
        self, change: Callable[[Target], Target], vet: Callable[[list[Answer]], None] | None
    ) -> None:
        async with self._changing:
            before, target = self.target, change(self.target)
            if target == before:
                return
            await asyncio.sleep(max(0.0, self._first_change - time.monotonic()))
            names = concerns(before, target)
            plans = {}
            for member in self._live():
                steps = steps_between(member.have, target, self._mask)
                rest = next((i for i, step in enumerate(steps) if step.what != "put"), len(steps))
                plans[member] = (tuple(steps[:rest]), tuple(steps[rest:]))
            answers = await self._ask(
                {
                    member: Order(next(self._numbers), "prepare", first, names)
                    for member, (first, _) in plans.items()
                }
            )
            try:
                if vet is not None:
                    vet(list(answers.values()))
            except BaseException:
                target, plans = before, dict.fromkeys(plans, ((), ()))
                raise
            finally:
                self.target = target
                done = await self._ask(
                    {
                        member: Order(next(self._numbers), "commit", plans[member][1], None, target)
                        for member in answers
                    }
                )
                for member in done:
                    member.have = target

    async def report(self, *paths: str) -> dict[str, Mapping[str, Any]]:
        """What these pages say on every member, by replica."""
        names = frozenset(paths)
        answers = await self._ask(
            {m: Order(next(self._numbers), "report", names=names) for m in self._live()}
        )
        return {member.replica: answer.pages for member, answer in answers.items()}

    async def reach(self) -> Reach:
        """Who has what is in force; waits for a change that is under way."""
        async with self._changing:
            reached = sorted(member.replica for member in self._live())
            return Reach(self.expected, reached, dict(self._out))

    # Members.

    def _live(self) -> list[Member]:
        now = time.monotonic()
        for member in list(self._members.values()):
            if member.lease_end < now:
                self._drop(member, f"it was not heard of for {self.lease_s:g} s")
        return list(self._members.values())

    async def _ask(self, orders: dict[Member, Order]) -> dict[Member, Answer]:
        """The answers of those members that did as they were told; the others are out."""
        answers = await asyncio.gather(*(self._ask_one(m, order) for m, order in orders.items()))
        return {
            member: answer
            for member, answer in zip(orders, answers, strict=True)
            if answer is not None
        }

    async def _ask_one(self, member: Member, order: Order) -> Answer | None:
        future = asyncio.get_running_loop().create_future()
        member.waiting[order.number] = future
        member.orders.put_nowait(order)
        while not future.done():
            left = member.lease_end - time.monotonic()
            if left <= 0:
                self._drop(member, f"it gave no answer for {self.lease_s:g} s")
                return None
            await asyncio.wait([future], timeout=left)
        if future.cancelled():
            return None  # it has left
        answer: Answer = future.result()
        if answer.why is not None:
            self._drop(member, answer.why)
            return None
        return answer

    def _drop(self, member: Member, why: str) -> None:
        self._forget(member)
        self._put_out(member.replica, why)
        logger.warning("replica %s is out: %s", member.replica, why)

    def _forget(self, member: Member) -> None:
        self._members.pop(member.ticket, None)
        for future in member.waiting.values():
            future.cancel()

    def _put_out(self, replica: str, why: str) -> None:
        self._out.pop(replica, None)
        self._out[replica] = why
        while len(self._out) > _MAX_OUT:
            del self._out[next(iter(self._out))]

"""Run arms over items, and keep what is finished: a run that was killed goes on where it was.

EVAL.part/                        beside EVAL, gone when that is written
  lock                            one run at a time
  eval-reverse.n4.scale-0.5-0f3a….json   answers and values of one finished arm, item by item
  eval-base-77c2….npz             the base's predictions of texts, from which the others diverge

The hash in a name is of everything that the answers depend on, so that nothing else is reused.
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from moescope.analysis.export import written_aside
from moescope.clients.data_card import write_whole
from moescope.clients.eval_arms import BASE_ARM, Arm
from moescope.clients.eval_asks import Ask, Measured, Reply, asks_of, measure
from moescope.clients.eval_engine import Runner
from moescope.clients.eval_items import Item
from moescope.clients.terminal import rate_progress
from moescope.tracer.errors import InputError

_FORMAT = 1  # of the files in EVAL.part, and of what they hold


@dataclass(frozen=True, slots=True)
class Asked:
    """The items of one split with their asks, flat: `places` are (item, name) of each ask."""

    split: str
    items: tuple[Item, ...]
    asks: list[Ask]
    places: list[tuple[int, str]]

    @classmethod
    def of(
        cls, split: str, items: Sequence[Item], tokenizer: Any, max_tokens: int, top: int
    ) -> "Asked":
        """Tokenise them all; InputError names a line that can't be."""
        named = [
            (number, name, ask)
            for number, item in enumerate(items)
            for name, ask in asks_of(item, tokenizer, max_tokens, top).items()
        ]
        places = [(number, name) for number, name, _ in named]
        return cls(split, tuple(items), [ask for _, _, ask in named], places)

    def thinned(self, most: int) -> "Asked":
        """With at most so many items of each kind, spread over those that there are."""
        kinds: dict[tuple[str, str], list[int]] = {}
        for number, item in enumerate(self.items):
            kinds.setdefault((item.axis, item.kind), []).append(number)
        kept = sorted(
            found[n * len(found) // min(most, len(found))]
            for found in kinds.values()
            for n in range(min(most, len(found)))
        )
        place = {number: new for new, number in enumerate(kept)}
        pairs = [
            (ask, (place[number], name))
            for ask, (number, name) in zip(self.asks, self.places, strict=True)
            if number in place
        ]
        items = tuple(self.items[number] for number in kept)
        return Asked(self.split, items, [ask for ask, _ in pairs], [where for _, where in pairs])

    def check_lengths(self, limit: int | None) -> None:
        """InputError if an ask is longer than the engine takes."""
        for (number, _), ask in zip(self.places, self.asks, strict=True):
            if limit is not None and ask.length > limit:
                item = self.items[number]
                raise InputError(
                    f"line {item.line} (example_id {item.example_id!r}): needs {ask.length} "
                    f"tokens, and the engine takes {limit}: raise it with `-- --max-model-len N`, "
                    "or lower --max-tokens"
                )

    def sha256(self) -> str:
        """Of everything that is asked."""
        hashed = hashlib.sha256()
        for item, ask in zip(self.places, self.asks, strict=True):
            hashed.update(json.dumps([item, asdict(ask)]).encode())
        for each in self.items:
            hashed.update(f"{each.example_id}\n{each.kind}\n{each!r}\n".encode())
        return hashed.hexdigest()


@contextmanager
def part_folder(out: Path) -> Iterator[Path]:
    """EVAL.part, for this process alone."""
    folder = out.with_name(f"{out.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"can't write {folder}: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another run writes to {folder}: wait for it, or choose another --out"
            ) from None
        yield folder


def remove_parts(folder: Path) -> None:
    """EVAL is written: what was kept for it can go."""
    shutil.rmtree(folder, ignore_errors=True)


class Measuring:
    """Measures arms with a runner, which is started when it is first needed."""

    def __init__(self, runner: Runner, enter: Any, folder: Path, console: Console | None) -> None:
        """`enter`: starts the runner; called when the first request is to be made, and then again.

        It must do nothing the second time.
        """
        self._runner, self._enter = runner, enter
        self._folder, self._console = folder, console
        self.num_reused = 0

    def arms(self, asked: Asked, arms: Sequence[Arm]) -> dict[str, list[Measured]]:
        """What each arm does with each item, by the arm's key; the base is always one of them."""
        assert BASE_ARM in arms
        kept = _Kept(self._folder, asked, self._runner.fingerprint())
        done = {arm.key: found for arm in arms if (found := kept.read(arm)) is not None}
        self.num_reused += len(done)
        base = kept.read_base() if BASE_ARM.key in done else None
        if base is None:
            done.pop(BASE_ARM.key, None)
        todo = [arm for arm in arms if arm.key not in done]
        if not todo:
            return done
        self._enter()
        asked.check_lengths(self._runner.max_length)
        with rate_progress(self._console) as progress:
            name = {"tune": "tuning", "eval": "evaluating"}[asked.split]
            bar = progress.add_task(name, total=len(todo) * len(asked.asks), rate="")
            # The base first: the divergence of all others is from it.
            for some in ([a for a in todo if a.mask is None], [a for a in todo if a.mask]):
                for arm, replies in self._run(asked, some, progress, bar):
                    if arm.mask is None:
                        base = {n: r for n, r in enumerate(replies) if r.ids is not None}
                        kept.write_base(base)
                    done[arm.key] = _measured(asked, replies, None if arm.mask is None else base)
                    kept.write(arm, done[arm.key])
        return done

    def _run(
        self, asked: Asked, arms: Sequence[Arm], progress: Progress, bar: Any
    ) -> Iterator[tuple[Arm, list[Reply]]]:
        """Each arm with its replies, when it has all of them."""
        replies: list[dict[int, Reply]] = [{} for _ in arms]
        started = time.monotonic()
        for count, (arm, ask, reply) in enumerate(self._runner.run(arms, asked.asks), start=1):
            replies[arm][ask] = reply
            rate = count / max(time.monotonic() - started, 1e-3)
            progress.update(bar, advance=1, rate=f"{rate:,.0f} requests/s")
            if len(replies[arm]) == len(asked.asks):
                yield arms[arm], [replies[arm][n] for n in range(len(asked.asks))]
                replies[arm] = {}


def _measured(
    asked: Asked, replies: Sequence[Reply], base: dict[int, Reply] | None
) -> list[Measured]:
    by_item: list[tuple[dict[str, Ask], dict[str, Reply], Reply | None]] = [
        ({}, {}, None) for _ in asked.items
    ]
    for n, ((number, name), ask, reply) in enumerate(
        zip(asked.places, asked.asks, replies, strict=True)
    ):
        asks, found, _ = by_item[number]
        asks[name], found[name] = ask, reply
        if base is not None and n in base:
            by_item[number] = (asks, found, base[n])
    return [
        measure(item, asks, found, there)
        for item, (asks, found, there) in zip(asked.items, by_item, strict=True)
    ]


class _Kept:
    """Finished arms of one split on disk."""

    def __init__(self, folder: Path, asked: Asked, fingerprint: Any) -> None:
        self._folder, self._asked = folder, asked
        self._depends = [_FORMAT, asked.sha256(), fingerprint]

    def _path(self, arm: Arm, suffix: str) -> Path:
        # As JSON has it: a tuple and a list are one.
        text = json.dumps([*self._depends, arm.sha256], default=list)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self._folder / f"{self._asked.split}-{arm.key}-{key}{suffix}"

    def read(self, arm: Arm) -> list[Measured] | None:
        """None if it is not finished, or was of other inputs."""
        try:
            rows = json.loads(self._path(arm, ".json").read_bytes())
        except OSError:
            return None
        return [Measured(answer, values) for answer, values in rows]

    def write(self, arm: Arm, measured: Sequence[Measured]) -> None:
        rows = [[each.answer, each.values] for each in measured]
        write_whole(self._path(arm, ".json"), [json.dumps(rows)], "unfinished evaluation")

    def read_base(self) -> dict[int, Reply] | None:
        """The base's replies to texts, by ask; None if they are not there."""
        try:
            with np.load(self._path(BASE_ARM, ".npz")) as arrays:
                return {
                    n: Reply(log_p=arrays[f"log_ps{n}"][:, 0], ids=arrays[f"ids{n}"],
                             log_ps=arrays[f"log_ps{n}"])
                    for n in arrays["asks"].tolist()
                }  # fmt: skip
        except (OSError, ValueError):
            return None

    def write_base(self, replies: dict[int, Reply]) -> None:
        arrays: dict[str, NDArray[Any]] = {"asks": np.array(list(replies), np.int64)}
        for n, reply in replies.items():
            assert reply.ids is not None and reply.log_ps is not None  # noqa: PT018
            arrays |= {f"ids{n}": reply.ids, f"log_ps{n}": reply.log_ps}
        with written_aside(self._path(BASE_ARM, ".npz")) as aside, aside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stubs take the names for options

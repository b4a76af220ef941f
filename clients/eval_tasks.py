"""Tasks of lm-evaluation-harness through a running server: without a mask, and under one.

lm_eval speaks with the server's /v1/completions. Every answer must say that the mask was in force
which its request named, or the run fails.
"""

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa

from moescope.analysis.effects import effects
from moescope.analysis.evaluation import ALL_KINDS, BASE, EFFECTS, OUTCOMES
from moescope.clients.data_card import write_whole
from moescope.clients.generate import generate
from moescope.tracer.errors import InputError

FORMAT = "moescope-tasks/1"
HEADER = "X-Steering-Mask"
NO_MASK = "none"
STEERED = "steered"
PARALLEL = 16
ATTEMPTS = 5
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class TaskRun:
    """What the tasks gave. `outcomes` and `effects` are as in an evaluation; `kind` is the task.

    `settings` has the server's model, the masks as they were in force, how many answers said so,
    and lm_eval's own results of each arm. `effects` has no rows without a mask.
    """

    settings: dict[str, Any]
    outcomes: pa.Table
    effects: pa.Table


def run_tasks(
    tasks: Sequence[str],
    url: str,
    model: str | None = None,
    tokenizer: str | None = None,
    *,
    mask: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    include_path: Path | None = None,
    api_key: str | None = None,
    seed: int = 0,
) -> TaskRun:
    """Run tasks without a mask and, if one is named, under it, and compare example by example.

    Args:
        tasks: names that lm_eval knows, or patterns of them.
        url: a `moescope serve` server.
        model: the served model's name; the first one if not given.
        tokenizer: folder or hub name; the server's model if not given.
        mask: NAME or NAME@VERSION. The version in force at the start is used throughout.
        limit: only this many examples of each task.
        num_fewshot: examples in the prompt, instead of the task's own number.
        chat: put prompts in the model's chat template.
        include_path: folder with tasks of one's own (YAML).
        api_key: the server's key for inference, if it has one.
        seed: of the intervals.

    Raises InputError when lm_eval is not installed, a task or mask is unknown, or an answer does
    not say that the right mask was in force.

    """
    harness = _harness()
    served = _served(url, model, api_key)
    manager, names = _find_tasks(harness, tasks, include_path)
    masks = {BASE: _in_force(url, served["id"], NO_MASK, api_key)}
    if mask is not None:
        masks[STEERED] = _in_force(url, served["id"], mask, api_key)
    found, counts = {}, {}
    for arm, key in masks.items():
        lm = _checked_model(key, url, served, tokenizer, api_key)
        options = {"limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": chat}
        found[arm] = _evaluate(harness, lm, manager, names, options)
        counts[arm] = lm.confirmed
    outcomes = _outcomes(found)
    arms = [{"arm": arm, "role": arm} for arm in masks]
    table = EFFECTS.empty_table() if mask is None else effects(outcomes, arms, seed=seed)
    # Over tasks of different metrics and lengths nothing is averaged.
    kept = [row for row in table.to_pylist() if row["kind"] != ALL_KINDS]
    settings = {
        "format": FORMAT,
        "tasks": names,
        "url": url,
        "model": served["id"],
        "masks": masks,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat": chat,
        "seed": seed,
        "confirmed_answers": counts,
        "results": {arm: result["results"] for arm, result in found.items()},
        "task_versions": found[BASE].get("versions"),
        "versions": {name: version(name) for name in ("moescope", "lm_eval")},
    }
    return TaskRun(settings, outcomes, pa.Table.from_pylist(kept, schema=EFFECTS))


def write_tasks(run: TaskRun, out: Path) -> None:
    """Write a run as JSON, whole: its settings, `effects` as rows, `outcomes` as columns."""
    whole = {
        **run.settings,
        "effects": run.effects.to_pylist(),
        "outcomes": run.outcomes.to_pydict(),
    }
    text = json.dumps(whole, indent=1, ensure_ascii=False, default=str)
    write_whole(out, [text + "\n"], "results")


# --- The server -----------------------------------------------------------------------------------


def _served(url: str, model: str | None, api_key: str | None) -> dict[str, Any]:
    """What the server says of the model: `id`, `root` and `max_model_len`."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=60)
        response.raise_for_status()
        models: list[dict[str, Any]] = response.json()["data"]
        chosen = [each for each in models if model in (None, each["id"])]
    except httpx.ConnectError as error:
        raise InputError(
            f"nothing answers at {url} ({error}): start a server with `moescope serve`, or say "
            "where it is with --url"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{url} does not list its models: {error}") from None
    if not chosen:
        there = ", ".join(each["id"] for each in models) or "none"
        raise InputError(f"{url} serves no model {model!r}; it serves {there}")
    return chosen[0]


def _in_force(url: str, model: str, mask: str, api_key: str | None) -> str:
    """The mask's key with its version, as an answer of the server says it."""
    key = generate("a", url, model=model, mask=mask, raw=True, max_tokens=1, api_key=api_key).mask
    if key.partition("@")[0] != mask.partition("@")[0]:
        raise InputError(
            f"{url} ran a request for the mask {mask} under {key}: with `--own-mask compose` a "
            "global mask adds to others. Take it away (`DELETE /v1/steering`), or start the "
            "server without that option."
        )
    return key


# --- lm_eval --------------------------------------------------------------------------------------


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.openai_completions
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(
            f"tasks need lm-evaluation-harness ({error}): pip install 'moescope[eval]'"
        ) from None
    return lm_eval


def _find_tasks(
    harness: Any, tasks: Sequence[str], include_path: Path | None
) -> tuple[Any, list[str]]:
    """lm_eval's index of tasks, and the names that are meant; InputError for one there isn't."""
    if not tasks:
        raise InputError("--tasks names no task: give some, such as arc_easy,hellaswag.")
    if include_path is not None:
        if not include_path.is_dir():
            raise InputError(f"--include-path {include_path} is no folder.")
        # To read all of lm_eval's own takes seconds.
        own = harness.tasks.TaskManager(include_path=str(include_path), include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own, _matches(own, tasks)
    manager = harness.tasks.TaskManager(include_path=include_path and str(include_path))
    for task in tasks:
        if not manager.match_tasks([task]):
            near = get_close_matches(task, manager.all_tasks) or ["arc_easy", "hellaswag"]
            raise InputError(f"lm_eval has no task {task!r}; it has {', '.join(near)}.")
    return manager, _matches(manager, tasks)


def _matches(manager: Any, tasks: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for task in tasks for name in manager.match_tasks([task])))


def _checked_model(
    key: str, url: str, served: dict[str, Any], tokenizer: str | None, api_key: str | None
) -> Any:
    """lm_eval's client of a completions API, that asks for a mask and checks what was in force."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class MaskedCompletions(LocalCompletionsAPI):  # type: ignore[misc]  # untyped
        """Counts answers in `confirmed`; raises InputError for one under another mask."""

        confirmed = 0

        def model_call(self, *args: Any, **kwargs: Any) -> Any:
            # The way of one request at a time, which shows no headers. Never taken: see PARALLEL.
            raise NotImplementedError

        async def amodel_call(self, session: Any, *args: Any, **kwargs: Any) -> Any:
            return await super().amodel_call(_Checked(session, self, key), *args, **kwargs)

    headers = {HEADER: key} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    max_length = int(served.get("max_model_len") or 2048)
    tokenizer = tokenizer or str(served.get("root") or served["id"])
    try:
        return MaskedCompletions(
            base_url=f"{url.rstrip('/')}/v1/completions",
            model=served["id"],
            tokenizer=tokenizer,
            tokenizer_backend="huggingface",
            num_concurrent=PARALLEL,
            max_retries=ATTEMPTS,
            max_length=max_length,
            max_gen_toks=min(256, max_length // 2),
            header=headers,
            timeout=TIMEOUT_S,
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"can't load the tokenizer {tokenizer}: {error}. Name the model's folder or hub name "
            "with --tokenizer."
        ) from None


@dataclass
class _Checked:
    """An aiohttp session whose answers must name the mask."""

    session: Any
    lm: Any
    key: str

    @asynccontextmanager
    async def post(self, url: str, **options: Any) -> AsyncIterator[Any]:
        """Ask, and check the answer's header before anybody reads the rest."""
        async with self.session.post(url, **options) as response:
            if response.ok:
                said = response.headers.get(HEADER)
                if said != self.key:
                    raise InputError(
                        f"{url} answered under the mask {said}, not {self.key}: nothing is "
                        "reported. Does a proxy take the header away, or has the server changed?"
                    )
                self.lm.confirmed += 1
            yield response


def _evaluate(
    harness: Any, lm: Any, manager: Any, names: list[str], options: dict[str, Any]
) -> dict[str, Any]:
    import aiohttp

    try:
        found: dict[str, Any] = harness.simple_evaluate(
            model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options
        )
    except InputError:
        raise
    except aiohttp.ClientResponseError as error:
        raise InputError(
            f"{lm.base_url} refused a request (HTTP {error.status} {error.message}); its words are "
            "in the log above."
        ) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise InputError(f"lm_eval can't run {', '.join(names)}: {error}") from error
    if lm.confirmed == 0:
        raise InputError(f"lm_eval asked {lm.base_url} nothing for {', '.join(names)}.")
    return found


def _outcomes(found: dict[str, dict[str, Any]]) -> pa.Table:
    """Every number of every example: schema OUTCOMES. Both arms must have had the same examples."""
    rows: list[dict[str, Any]] = []
    asked: dict[str, dict[tuple[Any, ...], str]] = defaultdict(dict)
    for arm, result in found.items():
        for task, samples in result["samples"].items():
            for sample in samples:
                example = f"{task}/{sample['doc_id']}"
                asked[arm][example, sample["filter"]] = sample["prompt_hash"]
                suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
                rows += [
                    {
                        "arm": arm,
                        "axis": "utility",
                        "task": "lm_eval",
                        "kind": task,
                        "example_id": example,
                        "split": "eval",
                        "metric": f"{metric}{suffix}",
                        "value": float(sample[metric]),
                    }
                    for metric in sample["metrics"]
                    if isinstance(sample[metric], int | float) and isfinite(sample[metric])
                ]
    if any(prompts != asked[BASE] for prompts in asked.values()):
        raise InputError(
            "lm_eval asked other prompts under the mask than without: is a task random?"
        )
    return pa.Table.from_pylist(rows, schema=OUTCOMES)

"""A running `moescope serve` that answers asks under masks, named by X-Steering-Mask.

The masks are pushed under names of their own and deleted afterwards. One arm is asked after the
other, many requests at once; an answer that does not say that its mask was in force is an error.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, Self

import httpx
import numpy as np
import tenacity

from moescope.clients.eval_arms import Arm
from moescope.clients.eval_asks import Ask, Reply
from moescope.clients.eval_engine import TOP, load_tokenizer, specimen_of
from moescope.clients.mask_http import delete_mask, push_mask
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask_format import NO_MASK

HEADER = "X-Steering-Mask"
PARALLEL = 16  # requests at once
PROMPTS = 8  # in one request
TIMEOUT_S = 600.0
ATTEMPTS = 8
MAX_WAIT_S = 20.0


class _BusyError(Exception):
    """The server can't take the request now: it has no free slot, or is overloaded."""


class ServerRunner:
    """A client of one server, for the time of an evaluation."""

    def __init__(
        self,
        url: str,
        tokenizer: str | None = None,
        *,
        top: int | None = None,
        admin_key: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._admin_key = admin_key
        self._top = TOP if top is None else top
        key = api_key or admin_key
        self._client = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT_S,
            limits=httpx.Limits(max_connections=PARALLEL),
        )
        served = self._get("/v1/models")["data"][0]
        self._model = str(served["id"])
        self._max_length = served.get("max_model_len")
        self._root = str(served.get("root") or served["id"])
        self._tokenizer = tokenizer or self._root
        admin = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
        self._moe = self._get("/v1/moe", headers=admin)
        self._pushed: dict[str, str] = {}  # names of masks on the server, with their keys

    @property
    def max_length(self) -> int | None:
        """As the server says it."""
        return self._max_length

    @property
    def top(self) -> int:
        """The server allows 20 if it was not started with more (`--max-logprobs`)."""
        return self._top

    @property
    def shape(self) -> MoeShape | None:
        """As the server says it."""
        moe = self._moe
        return MoeShape(tuple(moe["moe_layers"]), moe["num_experts"], moe["top_k"])

    def tokenizer(self) -> Any:
        """The one that was named, or the server's model's."""
        try:
            return load_tokenizer(self._tokenizer)
        except InputError as error:
            raise InputError(f"{error}: say where it is with --tokenizer") from None

    def about(self) -> dict[str, Any]:
        """The served model's name, and where."""
        about = {"model": self._model, "engine": {"url": self._url}}
        return about | specimen_of(self._root)

    def fingerprint(self) -> Any:
        """The server's model, as far as it tells."""
        said = [self._moe[name] for name in ("model", "architecture", "moe_layers", "router")]
        return [self._url, self._model, said, self._top]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        failed: list[InputError] = []
        for name in self._pushed:
            try:
                delete_mask(name, self._url, self._admin_key)
            except InputError as error:
                failed.append(error)
        self._pushed.clear()
        self._client.close()
        if failed and kind is None:  # or else it would hide what went wrong before
            raise failed[0]

    def run(self, arms: Sequence[Arm], asks: Sequence[Ask]) -> Iterator[tuple[int, int, Reply]]:
        """Every ask under every arm; several of one kind go in one request."""
        groups: dict[tuple[int | None, int], list[int]] = {}
        for number, ask in enumerate(asks):
            groups.setdefault((ask.max_tokens, ask.top), []).append(number)
        parts = [
            group[start : start + PROMPTS]
            for group in groups.values()
            for start in range(0, len(group), PROMPTS)
        ]
        with ThreadPoolExecutor(PARALLEL) as pool:
            for number, arm in enumerate(arms):
                key = self._push(arm)
                futures: dict[Future[list[Reply]], list[int]] = {
                    pool.submit(self._ask, key, [asks[n] for n in part]): part for part in parts
                }
                try:
                    for future in as_completed(futures):
                        for n, reply in zip(futures[future], future.result(), strict=True):
                            yield number, n, reply
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise

    def _push(self, arm: Arm) -> str:
        """Put the arm's mask on the server; returns its name with its version."""
        if arm.mask is None:
            return NO_MASK
        # Equal masks have equal names: what a killed run left there is used, and then deleted.
        digest = hashlib.sha256(arm.mask.to_json().encode()).hexdigest()[:16]
        name = f"eval-{arm.key}-{digest}"
        if name not in self._pushed:
            self._pushed[name] = ""  # to be deleted, whatever happens now
            mask = arm.mask.model_copy(update={"name": name})
            answer = push_mask(mask, self._url, self._admin_key)
            self._pushed[name] = f"{name}@{answer['version']}"
        return self._pushed[name]

    def _ask(self, key: str, asks: list[Ask]) -> list[Reply]:
        """One request with several prompts, tried again while the server is busy."""
        first = asks[0]
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": [ask.token_ids for ask in asks],
            "max_tokens": first.max_tokens or 1,
            # Said, since a server may have other defaults from the model's files.
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if first.max_tokens is None:
            body["prompt_logprobs"] = first.top
        try:
            choices = self._retrying(lambda: self._complete(key, body))
        except tenacity.RetryError as error:
            raise InputError(
                f"{self._url} is too busy ({error.last_attempt.exception()}): try again later"
            ) from None
        if sorted(choice["index"] for choice in choices) != list(range(len(asks))):
            raise InputError(f"{self._url} did not answer each of {len(asks)} prompts of a request")
        choices.sort(key=lambda choice: choice["index"])
        return [_reply(ask, choice) for ask, choice in zip(asks, choices, strict=True)]

    def _retrying(self, call: Callable[[], Any]) -> Any:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((_BusyError, httpx.TransportError)),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=MAX_WAIT_S),
        )(call)

    def _complete(self, key: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        response = self._client.post("/v1/completions", json=body, headers={HEADER: key})
        answer = _json(response)
        if response.status_code in (429, 503):
            raise _BusyError(f"HTTP {response.status_code}: {_message(answer)}")
        if not response.is_success:
            hint = ""
            if "logprobs" in str(_message(answer)):
                hint = ". Start it with `-- --max-logprobs N`, or lower --kl-top"
            raise InputError(
                f"{self._url} refused (HTTP {response.status_code}): {_message(answer)}{hint}"
            )
        in_force = response.headers.get(HEADER)
        if in_force != key:
            said = "does not say which mask was in force" if in_force is None else (
                f"ran a request for the mask {key} under {in_force}"
            )  # fmt: skip
            raise InputError(
                f"{self._url} {said}: it is no moescope server, or adds a global mask to others "
                "(`--own-mask compose`); take that away, or start it without"
            )
        choices: list[dict[str, Any]] = answer["choices"]
        return choices

    def _get(self, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._client.get(path, **options)
        except httpx.ConnectError as error:
            raise InputError(
                f"nothing answers at {self._url} ({error}): start a server with `moescope serve`, "
                "or say where it is with --url"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
            raise InputError(f"can't ask {self._url}: {error or type(error).__name__}") from None
        answer = _json(response)
        if not response.is_success or not isinstance(answer, dict):
            hint = "" if response.status_code != 401 else ". Give --admin-key and --api-key"
            raise InputError(
                f"{self._url}{path} answered HTTP {response.status_code} ({_message(answer)}): is "
                f"it a moescope server?{hint}"
            )
        return answer


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _message(answer: Any) -> Any:
    error = answer.get("error") if isinstance(answer, dict) else None
    return (error.get("message") if isinstance(error, dict) else error) or "no reason"


def _reply(ask: Ask, choice: dict[str, Any]) -> Reply:
    if ask.max_tokens is not None:
        return Reply(text=choice["text"])
    listed = choice.get("prompt_logprobs") or []
    if len(listed) != len(ask.token_ids):
        raise InputError("the server gave no probability for each token of a prompt")
    rows = [_row(ask, listed[position], position) for position in range(ask.first, ask.stop)]
    log_p = np.array([log_ps[0] for _, log_ps in rows], np.float32)
    if not ask.top:
        return Reply(log_p=log_p)
    return Reply(
        log_p=log_p,
        ids=np.array([ids for ids, _ in rows], np.int64),
        log_ps=np.array([log_ps for _, log_ps in rows], np.float32),
    )


def _row(ask: Ask, listed: dict[str, Any], position: int) -> tuple[list[int], list[float]]:
    """The position's own token, then the `ask.top` likeliest, as an engine lists them."""
    own = str(ask.token_ids[position])
    if own not in listed:
        raise InputError("the server gave the probabilities of other tokens than those asked for")
    names = [own, *(name for name in listed if name != own)]
    if len(names) == ask.top:  # it is among the likeliest
        names.append(own)
    if len(names) != ask.top + 1:
        raise InputError(f"the server gave {len(names)} tokens of a position, not {ask.top + 1}")
    return [int(name) for name in names], [float(listed[name]["logprob"]) for name in names]

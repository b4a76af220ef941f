"""Ask a running server for one text, steered and traced as wished."""

from dataclasses import dataclass
from typing import Any

import httpx

from moescope.tracer.errors import InputError

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A text, and what was in force: the mask's key or "none", and the run if it was traced."""

    text: str
    mask: str
    run: str | None


def generate(
    prompt: str,
    url: str,
    *,
    model: str | None = None,
    mask: str | None = None,
    run: str | None = None,
    raw: bool = False,
    max_tokens: int = 256,
    temperature: float = 0.0,
    api_key: str | None = None,
) -> Answer:
    """Generate one answer; InputError says why the server refused.

    Args:
        prompt: what the user says, or with `raw` the text to go on from.
        url: where the server is.
        model: the served model's name; the first one if not given.
        mask: NAME, NAME@VERSION or "none"; the global mask if not given.
        run: trace the request into this run.
        raw: a completion without chat template.
        max_tokens: how many tokens to generate at most.
        temperature: 0 takes the likeliest token each time.
        api_key: the server's key for inference, if it has one.

    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    wishes = {"X-Steering-Mask": mask, "X-Trace-Run": run}
    try:
        with httpx.Client(
            base_url=f"{url.rstrip('/')}/v1", headers=headers, timeout=TIMEOUT_S
        ) as client:
            name = model or _json(client.get("/models"), url)["data"][0]["id"]
            body = {"model": name, "max_tokens": max_tokens, "temperature": temperature}
            said = {"prompt": prompt} if raw else {"messages": [_user(prompt)]}
            response = client.post(
                "/completions" if raw else "/chat/completions",
                json=body | said,
                headers={header: value for header, value in wishes.items() if value is not None},
            )
            choice = _json(response, url)["choices"][0]
    except httpx.ConnectError as error:
        raise InputError(
            f"nothing answers at {url} ({error}): start a server with `moescope serve`, or say "
            "where it is with --url"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
        raise InputError(f"can't ask {url}: {error or type(error).__name__}") from None
    except (KeyError, IndexError, TypeError):
        raise InputError(f"{url} answered without a text: is it a moescope server?") from None
    in_force = response.headers.get("X-Steering-Mask")
    if in_force is None:
        # A server without moescope ignores the header: its answer is not what was asked for.
        raise InputError(f"{url} does not say which mask was in force: it is no moescope server")
    text = choice["text"] if raw else choice["message"]["content"]
    return Answer(text or "", in_force, response.headers.get("X-Trace-Run"))


def _user(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}


def _json(response: httpx.Response, url: str) -> Any:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.is_error:
        error = answer.get("error") if isinstance(answer, dict) else None
        reason = error.get("message") if isinstance(error, dict) else error
        raise InputError(f"{url} refused (HTTP {response.status_code}): {reason or 'no reason'}")
    return answer

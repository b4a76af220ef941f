"""The settings: one table of names, defaults and explanations.

Each can be given as an environment variable MOESCOPE_NAME, or as an argument to `trace(...)`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from moescope.tracer.errors import InputError
from moescope.tracer.object_path import Where, store_path


def _store(where: Where | None) -> str | None:
    return None if where is None else str(store_path(where))


class Settings(BaseSettings):
    """How traces are kept. The field descriptions are the documentation."""

    model_config = SettingsConfigDict(env_prefix="MOESCOPE_", frozen=True, extra="forbid")

    store: Annotated[str | None, BeforeValidator(_store)] = Field(
        None,
        description="Trace store to attach when an engine starts (`vllm serve`): a folder, "
        "s3://BUCKET/PATH or gs://BUCKET/PATH; none: idle.",
    )
    trace: Literal["on", "off"] = Field(
        "off", description="Whether requests that say nothing about tracing are traced."
    )
    policy: Literal["block", "drop"] = Field(
        "block",
        description="When the ring is full: `block` lets the engine wait (nothing is lost), "
        "`drop` lets rows go, counts them and marks their requests incomplete.",
    )
    ring_mib: int = Field(
        256, ge=1, description="Size of the shared ring between the engine and the writer, in MiB."
    )
    file_rows: int = Field(
        131_072, ge=1, description="Rows of finished requests that make a file of the store."
    )
    flush_seconds: float = Field(
        30.0, gt=0, description="Finished requests wait at most this long for their file."
    )
    writer_mib: int = Field(
        4096,
        ge=1,
        description="Memory for rows of unfinished requests, in MiB; beyond it they go to an "
        "unnamed temporary file in the store's folder.",
    )
    steer: Literal["auto", "on"] = Field(
        "auto",
        description="`on`: CUDA graphs route with moescope's own kernel, which knows masks; "
        "experts are vLLM's, and weights but for their last bits. `auto`: graphs keep vLLM's "
        "kernels and can't be steered. Engines without graphs always can.",
    )
    slots: int = Field(
        16, ge=1, le=1024, description="Different masks that requests can be steered by at once."
    )
    own_mask: Literal["replace", "compose"] = Field(
        "replace",
        description="A request's own mask under a global one: `replace` takes the global one's "
        "place, `compose` adds to it (docs/masks.md).",
    )


def load_settings(**given: object) -> Settings:
    """The settings from arguments, then environment, then defaults; InputError if one is wrong."""
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]  # pydantic checks the values
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))} = {item['input']!r}: {item['msg']}"
            for item in error.errors()
        )
        raise InputError(
            f"bad setting: {problems} (set it as an argument or as MOESCOPE_NAME in the "
            "environment; docs/settings.md lists them)"
        ) from None

"""The control plane's settings, from `moescope serve` or from the environment.

The tracer's own settings (MOESCOPE_STORE, MOESCOPE_SLOTS, ...) stand in moescope.tracer.settings,
since every process of the engine reads them; these are for the API server's process alone.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from moescope.tracer.errors import InputError


class ServerSettings(BaseSettings):
    """What the control plane needs to know; the field descriptions are the documentation."""

    model_config = SettingsConfigDict(env_prefix="MOESCOPE_", frozen=True, extra="ignore")

    masks: Path | None = Field(
        None, description="Folder of the masks and of the audit log; none: no control plane."
    )
    admin_key: SecretStr | None = Field(
        None, description="The key that control-plane routes ask for."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Log lines of requests and changes for people, or as JSON objects."
    )

    @field_validator("admin_key")
    @classmethod
    def _check_key(cls, key: SecretStr | None) -> SecretStr | None:
        text = None if key is None else key.get_secret_value()
        # An empty key is most likely a variable that someone forgot to fill.
        if text is not None and not (text and text.isascii() and text.isprintable()):
            raise ValueError("must be printable ASCII text, and not empty")
        if text is not None and " " in text:
            raise ValueError("must not contain spaces")
        return key


_given: ServerSettings | None = None


def give_settings(settings: ServerSettings) -> None:
    """Set what the plugin will find: the key need not stand in the environment of every process."""
    global _given
    _given = settings


def server_settings() -> ServerSettings:
    """The settings that were given, or else those of the environment; InputError if one is bad."""
    return load_server_settings() if _given is None else _given


def load_server_settings(**given: object) -> ServerSettings:
    """The settings from arguments, then environment; InputError names a bad one, not its value."""
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return ServerSettings(**given)  # type: ignore[arg-type]  # pydantic checks the values
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))} {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise InputError(f"bad setting: {problems} (docs/settings.md lists them)") from None

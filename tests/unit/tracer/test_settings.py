from pathlib import Path

import pytest

from moescope.tracer.errors import InputError
from moescope.tracer.settings import Settings, load_settings

DOCS = Path(__file__).parents[3] / "docs"


def test_every_setting_is_documented_as_it_is():
    text = (DOCS / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        default = "none" if field.default is None else field.default
        assert f"| `{name}` | {default} | {field.description} |" in text


def test_an_argument_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("MOESCOPE_POLICY", "drop")
    monkeypatch.setenv("MOESCOPE_RING_MIB", "7")
    assert load_settings(policy="block") == Settings(policy="block", ring_mib=7)


@pytest.mark.parametrize(
    ("name", "value"), [("policy", "keep"), ("ring_mib", 0), ("flush_seconds", "soon")]
)
def test_a_bad_setting_is_named_wherever_it_comes_from(monkeypatch, name, value):
    with pytest.raises(InputError, match=f"{name} = {value!r}"):
        load_settings(**{name: value})
    monkeypatch.setenv(f"MOESCOPE_{name.upper()}", str(value))
    with pytest.raises(InputError, match=name):
        load_settings()

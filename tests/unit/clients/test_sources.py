"""Files that can't be read, and names on the hub."""

import pytest

from moescope.clients.sources import open_source
from moescope.tracer.errors import InputError

ROWS = [{"question": "Who cast the bell?"}]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("s.jsonl", '{"question": "a"}\n\n{"question" "b"}\n', "line 3, column 13"),
        ("s.jsonl", '{"question": "a"}\n[1]\n', "line 2 is not an object"),
        ("s.jsonl", "\xe9", "is not JSON"),
        ("s.jsonl", "", "is empty"),
        ("s.csv", "", "is empty"),
        ("s.parquet", "x", "can't read rows in"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said), open_source(tmp_path / name, "Expected."):
        pass


class _Builder:
    """Stands for the hub's data set."""

    base_path = "hf://datasets/some/trivia@0123abc"

    def __init__(self):
        self.info = type("Info", (), {"splits": {"test": 1, "validation": 1}, "license": "apache"})
        self.config = type("Config", (), {"name": "rc"})
        self.asked = []

    def download_and_prepare(self):
        pass

    def as_dataset(self, split):
        import datasets

        self.asked.append(split)
        return datasets.Dataset.from_list(ROWS)


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [
        ("some/trivia", None, "validation"),
        ("some/trivia:rc", "rc", "validation"),
        ("some/trivia:rc@train[:10%]", "rc", "train[:10%]"),
    ],
)
def test_a_name_on_the_hub(monkeypatch, name, config, split):
    import datasets

    builder, asked = _Builder(), []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a: asked.append(a) or builder)
    with open_source(name, "") as source:
        assert (list(source.rows), source.columns) == (ROWS, {"question"})
    assert (asked, builder.asked) == ([("some/trivia", config)], [split])
    assert source.origin | {"fingerprint": ""} == {
        "hub": "some/trivia",
        "config": "rc",
        "split": split,
        "revision": "0123abc",
        "fingerprint": "",
        "licence": "apache",
    }


def test_the_hub_offline(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with (
        pytest.raises(InputError, match=r"no file nobody/nothing.*Without a network, name a local"),
        open_source("nobody/nothing", ""),
    ):
        pass

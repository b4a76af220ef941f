import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.server.audit import replay
from moescope.server.errors import ConflictError, UnknownError
from moescope.server.registry import Registry
from moescope.tracer.errors import InputError, StoreError
from moescope.tracer.mask import make_mask


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "masks"


@pytest.fixture
def registry(folder):
    registry = Registry(folder)
    yield registry
    registry.close()


def reopened(registry, folder):
    registry.close()
    return Registry(folder)


def audit(folder):
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_versions_count_up_and_never_change(registry, folder, mask):
    assert registry.put(mask("calm", 1), "w")[0].key == "calm@1"
    assert registry.put(mask("calm", 2), "w")[0].key == "calm@2"
    assert registry.get("calm").version == 2
    assert registry.get("calm", 1).mask == mask("calm", 1)
    assert registry.versions("calm") == [1, 2]
    assert sorted(file.name for file in (folder / "calm").iterdir()) == ["1.json", "2.json"]


def test_the_same_mask_again_is_no_version(registry, folder, mask):
    first, created = registry.put(mask("calm", 1), "w")
    again, created_again = registry.put(mask("calm", 1), "w")
    assert (created, created_again) == (True, False)
    assert first == again
    assert len(audit(folder)) == 1
    assert registry.put(mask("calm", 2), "w")[1]
    assert registry.put(mask("calm", 1), "w")[0].version == 3


def test_names_are_resolved(registry, mask):
    registry.put(mask("calm", 1), "w")
    registry.put(mask("calm", 2), "w")
    assert registry.resolve("calm").key == "calm@2"
    assert registry.resolve("calm@1").key == "calm@1"
    for unknown in ("calm@3", "storm", "storm@1"):
        with pytest.raises(UnknownError, match=unknown.partition("@")[0]):
            registry.resolve(unknown)
    for bad in (
        "",
        "@1",
        "calm@",
        "calm@0",
        "calm@01",
        "calm@-1",
        "calm@latest",
        "calm@1@2",
        "NONE",
    ):
        with pytest.raises(InputError):
            registry.resolve(bad)
    for path in ("../calm", "a/b", "..", ".lock", "calm@" + "9" * 5000):
        with pytest.raises(InputError):
            registry.resolve(path)


@pytest.mark.parametrize("name", ["state.json", "audit.jsonl", "State.JSON"])
def test_names_of_the_registrys_own_files_are_taken(registry, mask, name):
    with pytest.raises(InputError, match="choose another"):
        registry.put(mask(name, 1), "w")


def test_a_deleted_name_is_gone_and_its_numbers_never_come_again(registry, folder, mask):
    registry.put(mask("calm", 1), "w")
    registry.put(mask("calm", 2), "w")
    assert registry.delete("calm", "w") == "calm@2"
    assert registry.all() == []
    for ask in ("calm", "calm@1", "calm@2"):
        with pytest.raises(UnknownError):
            registry.resolve(ask)
    with pytest.raises(UnknownError):
        registry.delete("calm", "w")
    registry = reopened(registry, folder)
    assert registry.put(mask("calm", 2), "w")[0].key == "calm@3"
    assert registry.versions("calm") == [3]
    with pytest.raises(UnknownError, match="only 3"):
        registry.resolve("calm@2")
    assert (folder / "calm" / "1.json").exists()  # for those who read old traces
    registry.close()


def test_the_global_mask_can_not_be_deleted(registry, mask):
    registry.put(mask("calm", 1), "w")
    registry.put(mask("calmer", 1), "w")
    registry.set_steering("calm@1", "w")
    with pytest.raises(ConflictError, match="/v1/steering"):
        registry.delete("calm", "w")
    registry.delete("calmer", "w")
    registry.set_steering(None, "w")
    registry.delete("calm", "w")


def test_every_change_is_one_line(registry, folder, mask):
    registry.put(mask("calm", 1), "key:1")
    registry.set_steering("calm@1", "key:2")
    registry.set_steering("calm@1", "key:2")
    registry.set_steering(None, "key:2")
    registry.delete("calm", "key:3")
    lines = audit(folder)
    assert [(a["who"], a["what"], a["name"], a["before"], a["after"]) for a in lines] == [
        ("key:1", "put", "calm", None, "calm@1"),
        ("key:2", "steering", None, None, "calm@1"),
        ("key:2", "steering", None, "calm@1", None),
        ("key:3", "delete", "calm", "calm@1", None),
    ]
    assert all(line["when"].endswith("+00:00") for line in lines)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["put", "delete", "steer", "unsteer", "restart"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 3),
    ),
    max_size=25,
)


@given(CHANGES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_log_replays_to_the_state_and_so_does_a_restart(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("masks")
    registry = Registry(folder)
    for what, name, expert in changes:
        entry = {"layer": 1, "expert": expert, "action": "deactivate"}
        try:
            if what == "put":
                registry.put(make_mask(name=name, entries=[entry]), "w")
            elif what == "delete":
                registry.delete(name, "w")
            elif what == "steer":
                registry.set_steering(registry.resolve(name).key, "w")
            elif what == "unsteer":
                registry.set_steering(None, "w")
            else:
                registry = reopened(registry, folder)
        except (UnknownError, ConflictError):
            pass
        assert replay(audit(folder) if (folder / "audit.jsonl").exists() else []) == registry.state
    before, masks = registry.state, registry.all()
    registry = reopened(registry, folder)
    assert registry.state == before
    assert registry.all() == masks
    assert "recovery" not in {line["who"] for line in registry._audit.lines()}
    registry.close()


def test_half_a_line_is_cut_off_and_its_change_is_found_in_the_files(registry, folder, mask):
    registry.put(mask("calm", 1), "w")
    registry.put(mask("calm", 2), "w")
    log = folder / "audit.jsonl"
    os.truncate(log, log.stat().st_size - 5)
    registry = reopened(registry, folder)
    assert registry.get("calm").version == 2
    assert [line["what"] for line in audit(folder)] == ["put", "recover"]
    assert replay(audit(folder)) == registry.state
    registry.close()


def test_a_change_that_crashed_before_its_line_is_logged_at_the_next_start(registry, folder, mask):
    registry.put(mask("calm", 1), "w")
    (folder / "state.json").write_text('{"steering": "calm@1", "deleted": {}}')
    registry = reopened(registry, folder)
    assert registry.state.steering == "calm@1"
    assert audit(folder)[-1]["who"] == "recovery"
    assert replay(audit(folder)) == registry.state
    registry.close()


def test_the_number_of_a_lost_file_does_not_come_again(registry, folder, mask):
    registry.put(mask("calm", 1), "w")
    registry.put(mask("calm", 2), "w")
    (folder / "calm" / "2.json").unlink()
    registry = reopened(registry, folder)
    assert registry.all() == []
    assert registry.put(mask("calm", 3), "w")[0].version == 3
    registry.close()


def test_a_lost_global_mask_is_an_error(registry, folder, mask):
    registry.put(mask("calm", 1), "w")
    registry.set_steering("calm@1", "w")
    (folder / "calm" / "1.json").unlink()
    registry.close()
    with pytest.raises(StoreError, match=r"calm@1 .* state.json"):
        Registry(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("state.json", "{"),
        ("state.json", "[]"),
        ("audit.jsonl", "nonsense\n"),
        ("calm/1.json", "{"),
        ("calm/x.json", '{"name": "calm", "entries": []}'),
        ("storm/1.json", '{"name": "calm", "entries": []}'),
    ],
)
def test_damaged_files_are_named(registry, folder, mask, file, text):
    registry.put(mask("calm", 1), "w")
    registry.set_steering("calm@1", "w")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(text)
    registry.close()
    with pytest.raises((StoreError, InputError), match=file.rpartition("/")[2]):
        Registry(folder)


@pytest.mark.usefixtures("registry")
def test_two_servers_can_not_share_a_folder(folder):
    with pytest.raises(StoreError, match="another server"):
        Registry(folder)


def test_a_folder_that_can_not_be_written_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't write"):
        Registry(tmp_path / "file" / "masks")

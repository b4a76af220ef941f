"""docs/sql.md: every query runs and finds something, every view and macro is described."""

import re
from pathlib import Path

import pytest

from moescope.analysis import open_store

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "sql.md").read_text()
QUERIES = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def con():
    return open_store(ROOT / "examples" / "traces")


def test_there_are_enough():
    assert len(QUERIES) >= 12


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_a_query_finds_rows(con, query, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert con.execute(query).fetchall()


def columns(con, relation):
    return [row[0] for row in con.execute(f"DESCRIBE FROM {relation}").fetchall()]


def tables():
    """Name and cells of every row of the page's tables."""
    for line in PAGE.splitlines():
        if match := re.match(r"\| `(\w+)(\(.*\))?` \|(.*)", line):
            yield match[1], bool(match[2]), re.findall(r"`(\w+)`", match[3])


def test_the_views_have_the_columns_that_the_page_lists(con):
    listed = {name: cells for name, macro, cells in tables() if not macro}
    assert set(listed) == {"tokens", "requests", "routing", "activation", "model"}
    for view, cells in listed.items():
        assert columns(con, view) == cells


def test_the_macros_have_the_columns_that_the_page_lists(con):
    query = "SELECT function_name FROM duckdb_functions() WHERE function_type = 'table_macro'"
    there = {name for (name,) in con.execute(query + " AND NOT internal").fetchall()}
    listed = {name: cells for name, macro, cells in tables() if macro}
    assert set(listed) == there
    arguments = {"coactivation": "1", "expert_tokens": "1, 0", "request_routing": "'q'"}
    arguments["expert_contexts"] = "1, 0, [1]"
    for name, cells in listed.items():
        found = columns(con, f"{name}({arguments.get(name, '')})")
        assert [column for column in cells if column not in found] == [], name
        assert set(found) - set(cells) <= {"layer", "expert", *columns(con, "tokens")}, name

"""Whose a catalog is: our own goes on, a stranger's database is never written to."""

from __future__ import annotations

import contextlib
import pathlib
import sqlite3

import pytest

from mpserverd.errors import LayoutError, StartError
from mpserverd.storer.catalog import APPLICATION_ID, CATALOG_FILE, Catalog
from tests.unit.storer.rig import Rig


def make(spool: pathlib.Path, *statements: str) -> pathlib.Path:
    with contextlib.closing(sqlite3.connect(spool / CATALOG_FILE, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    return spool / CATALOG_FILE


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE recipe(title TEXT)", "INSERT INTO recipe VALUES ('soup')"],
        ["CREATE TABLE meta(name TEXT)"],
        ["CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT)", "INSERT INTO meta VALUES ('version', '1')"],
        ["CREATE VIEW empty AS SELECT 1"],
        ["CREATE TABLE recipe(title TEXT)", "PRAGMA application_id = 77"],
        ["PRAGMA application_id = 77"],
    ],
)
def test_a_strangers_database_is_refused_and_stays_as_it_is(tmp_path: pathlib.Path, statements: list[str]) -> None:
    path = make(tmp_path, *statements)
    before = path.read_bytes()
    with pytest.raises(LayoutError, match=r"not a catalog of mpserverd.*move it away"):
        Catalog(str(tmp_path), durable=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [CATALOG_FILE]


def test_a_file_that_is_no_database_is_refused_and_stays_as_it_is(tmp_path: pathlib.Path) -> None:
    path = tmp_path / CATALOG_FILE
    path.write_bytes(b"a shopping list" * 100)
    with pytest.raises(StartError, match="run mpserverctl repair"):
        Catalog(str(tmp_path), durable=True)
    assert path.read_bytes() == b"a shopping list" * 100


def test_an_empty_file_becomes_a_catalog_with_our_mark(tmp_path: pathlib.Path) -> None:
    (tmp_path / CATALOG_FILE).touch()
    Catalog(str(tmp_path), durable=True).close()
    with contextlib.closing(sqlite3.connect(tmp_path / CATALOG_FILE)) as connection:
        assert connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    Catalog(str(tmp_path), durable=True).close()


def test_a_catalog_from_before_the_mark_goes_on_and_gets_it(rig: Rig) -> None:
    client = rig.named("one")
    client.send(1600)
    client.end()
    rig.step()
    rig.desk.catalog._connection.execute("PRAGMA application_id = 0")
    rig.restart()
    assert rig.named("one").sent == 1600
    assert rig.one("PRAGMA application_id") == APPLICATION_ID

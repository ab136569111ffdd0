"""Puts a rebuilt catalog in the place of the old one, so that a kill at any instant loses neither.

Order: the old catalog's file goes aside first, then its log, and the new one comes last. In between there is no
catalog, and no daemon starts without one where streams are. ``plan.json`` in the place of work says under which name
the old one lies; who comes after a kill first brings that back. A log never stays beside another catalog than its own:
SQLite would write it into that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil

from mpserverd.storer import filesystem
from mpserverd.storer.catalog import CATALOG_FILE
from mpserverd.storer.repair_salvage import SUFFIXES

WORK_DIRECTORY = ".repair"
_PLAN = "plan.json"


def begin(spool: str) -> str:
    """A fresh place of work within the spool, after undoing what a killed repair had begun. Raises OSError."""
    place = os.path.join(spool, WORK_DIRECTORY)
    _undo(spool, place)
    shutil.rmtree(place, ignore_errors=True)
    os.mkdir(place, 0o700)
    return place


def end(place: str) -> None:
    shutil.rmtree(place, ignore_errors=True)


def swap(spool: str, place: str, stamp: str) -> str:
    """Make ``place``'s catalog the spool's. Returns the name of the old one, "" for none. Raises OSError."""
    name = _free_name(spool, stamp)
    with open(os.path.join(place, _PLAN), "w", encoding="utf-8") as file:
        json.dump({"aside": name}, file)
        file.flush()
        os.fsync(file.fileno())
    filesystem.sync_directory(place)
    filesystem.sync_directory(spool)
    for suffix in SUFFIXES:
        _rename(spool, CATALOG_FILE + suffix, name + suffix)
    filesystem.sync_directory(spool)
    os.rename(os.path.join(place, CATALOG_FILE), os.path.join(spool, CATALOG_FILE))
    filesystem.sync_directory(spool)
    return name if os.path.exists(os.path.join(spool, name)) else ""


def _undo(spool: str, place: str) -> None:
    """Bring the old catalog back, the log first, if the new one had not come yet."""
    try:
        with open(os.path.join(place, _PLAN), encoding="utf-8") as file:
            name = str(json.load(file)["aside"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing was moved before it was whole
    if os.path.exists(os.path.join(spool, CATALOG_FILE)):
        return
    for suffix in reversed(SUFFIXES):
        _rename(spool, name + suffix, CATALOG_FILE + suffix)
    filesystem.sync_directory(spool)


def _rename(directory: str, old: str, new: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.rename(os.path.join(directory, old), os.path.join(directory, new))


def _free_name(spool: str, stamp: str) -> str:
    for number in range(1, 10_000):
        name = f"{CATALOG_FILE}.{stamp}{'' if number == 1 else f'.{number}'}.aside"
        if not any(os.path.lexists(os.path.join(spool, name + suffix)) for suffix in SUFFIXES):
            return name
    raise RuntimeError(f"too many catalogs were set aside in {spool}")

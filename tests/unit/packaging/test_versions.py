"""The version stands in mpserverd/version.py, and the package's changelog says the same."""

from __future__ import annotations

import pathlib
import re

from mpserverd.version import VERSION

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_newest_entry_of_the_changelog_is_this_version() -> None:
    first = (ROOT / "debian" / "changelog").read_text().splitlines()[0]
    assert re.match(r"mpserverd \((.*)\) ", first)[1] == VERSION  # type: ignore[index]

#!/usr/bin/python3 -I
"""The command mpload of the package mpserverd-load, with modules of its own: no daemon need be installed."""

import sys

sys.path.insert(0, "/usr/share/mpserverd-load")

from mpserverd.cli.load import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

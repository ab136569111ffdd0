#!/usr/bin/python3 -I
"""The command mpload of the package mpserverd-load, with modules of its own: no daemon need be installed."""

import os
import sys

MODULES = "/usr/share/mpserverd-load"

sys.path.insert(0, MODULES)
# `mpload chaos` starts a daemon and clients of its own, from the same modules.
os.environ["PYTHONPATH"] = MODULES

from mpserverd.cli.load import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

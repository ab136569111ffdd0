"""Every error this project raises on purpose.

    MpserverdError            exit code 1
      ConfigError             2   one or more faults in configuration files or --set
      UsageError              2   a command line that makes no sense
      UnreachableError        3   no daemon answers on the control socket
      StartError              1   an operating fault that prevents the start (port, memory, permission)
      LayoutError             1   shared memory or a spool of a layout this version does not know
      ProtocolError           1   a peer of the control socket spoke nonsense
      SpoolError              1   a spool that cannot be read as asked
        StreamNotFoundError   1   no such stream
        DamageError           1   bytes on disk contradict the catalog

A fault of a client is none of these: it is a CloseReason (arena/state.py), counted, and the connection ends.
"""

from __future__ import annotations


class MpserverdError(Exception):
    """Base of all; ``exit_code`` is what a program leaves with when nobody catches it."""

    exit_code = 1


class ConfigError(MpserverdError):
    """All faults found in the configuration, one line each, in ``faults``."""

    exit_code = 2

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class UsageError(MpserverdError):
    exit_code = 2


class UnreachableError(MpserverdError):
    exit_code = 3


class StartError(MpserverdError):
    pass


class LayoutError(MpserverdError):
    pass


class ProtocolError(MpserverdError):
    pass


class SpoolError(MpserverdError):
    pass


class StreamNotFoundError(SpoolError):
    pass


class DamageError(SpoolError):
    pass

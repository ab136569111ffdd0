"""The life of a child process as a table: state x event -> state.

The values of ``ChildState`` are the words that logs, metrics and mpserverctl show; ``number`` is what stands in the
child's slot. A pair that is not in the table is a fault of the supervisor and raises.

Pure: nothing here knows of processes, clocks or logs.
"""

from __future__ import annotations

import enum


class ChildState(enum.Enum):
    DEAD = "dead"  # no process; also before the first fork
    STARTING = "starting"  # forked, has not said READY
    RUNNING = "running"
    STOPPING = "stopping"  # told to drain or to let go; its exit is regular
    KILLED = "killed"  # SIGKILL sent, the kernel has not yet ended it
    STUCK = "stuck"  # the storer does not beat, or SIGKILL does not end the process: it keeps what it owns
    BACKOFF = "backoff"  # dead, to be forked again later
    GIVEN_UP = "given-up"  # dead, not to be forked again

    @property
    def number(self) -> int:
        return _NUMBERS[self]

    @property
    def alive(self) -> bool:
        """A process exists, so nobody else may touch what it owns."""
        return self in _ALIVE


_NUMBERS = {state: number for number, state in enumerate(ChildState)}
_BY_NUMBER = tuple(ChildState)


def state_from_number(number: int) -> ChildState:
    """The state that a slot's STATE word names. Raises IndexError."""
    return _BY_NUMBER[number]


class ChildEvent(enum.Enum):
    FORKED = "forked"
    SAID_READY = "said ready"
    TOLD_TO_STOP = "told to stop"
    SIGKILLED = "sigkilled"
    BEAT_MISSED = "beat missed"
    BEAT_SEEN = "beat seen"
    EXITED = "exited"  # its pidfd fired and it was reaped
    WILL_RETRY = "will retry"
    GAVE_UP = "gave up"


class IllegalMoveError(Exception):
    """A pair of state and event that must not happen."""


_S, _E = ChildState, ChildEvent
_ALIVE = frozenset({_S.STARTING, _S.RUNNING, _S.STOPPING, _S.KILLED, _S.STUCK})

TRANSITIONS: dict[tuple[ChildState, ChildEvent], ChildState] = {
    (_S.DEAD, _E.FORKED): _S.STARTING,
    (_S.BACKOFF, _E.FORKED): _S.STARTING,
    (_S.STARTING, _E.SAID_READY): _S.RUNNING,
    # what a child said before it knew that it is to stop, or to die, changes nothing
    (_S.STOPPING, _E.SAID_READY): _S.STOPPING,
    (_S.KILLED, _E.SAID_READY): _S.KILLED,
    (_S.STUCK, _E.SAID_READY): _S.STUCK,
    (_S.STARTING, _E.TOLD_TO_STOP): _S.STOPPING,
    (_S.RUNNING, _E.TOLD_TO_STOP): _S.STOPPING,
    (_S.STOPPING, _E.TOLD_TO_STOP): _S.STOPPING,
    (_S.STUCK, _E.TOLD_TO_STOP): _S.STUCK,
    (_S.KILLED, _E.TOLD_TO_STOP): _S.KILLED,
    (_S.BACKOFF, _E.TOLD_TO_STOP): _S.DEAD,
    (_S.STARTING, _E.SIGKILLED): _S.KILLED,
    (_S.RUNNING, _E.SIGKILLED): _S.KILLED,
    (_S.STOPPING, _E.SIGKILLED): _S.KILLED,
    (_S.STUCK, _E.SIGKILLED): _S.KILLED,
    (_S.KILLED, _E.SIGKILLED): _S.KILLED,
    (_S.RUNNING, _E.BEAT_MISSED): _S.STUCK,
    (_S.STOPPING, _E.BEAT_MISSED): _S.STUCK,
    (_S.KILLED, _E.BEAT_MISSED): _S.STUCK,
    (_S.STUCK, _E.BEAT_SEEN): _S.RUNNING,
    (_S.STARTING, _E.EXITED): _S.DEAD,
    (_S.RUNNING, _E.EXITED): _S.DEAD,
    (_S.STOPPING, _E.EXITED): _S.DEAD,
    (_S.KILLED, _E.EXITED): _S.DEAD,
    (_S.STUCK, _E.EXITED): _S.DEAD,
    (_S.DEAD, _E.WILL_RETRY): _S.BACKOFF,
    (_S.DEAD, _E.GAVE_UP): _S.GIVEN_UP,
}


def next_state(state: ChildState, event: ChildEvent) -> ChildState:
    """The state after ``event``. Raises IllegalMoveError."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalMoveError(f"a child that is {state.value} cannot have {event.value}") from None

"""The commands of the control socket: one row each, with who may do what and its line of help."""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from mpserverd import log
from mpserverd.arena.state import FIRST_WORKER_SLOT, STORER_SLOT, SUPERVISOR_SLOT, Head
from mpserverd.config.schema import LogLevel
from mpserverd.config.show import as_dict
from mpserverd.control.messages import Reply, Request
from mpserverd.errors import MpserverdError, UsageError
from mpserverd.net.channel import Kind
from mpserverd.supervisor.accepting import Accepting
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connection import Connection
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.control_server import Answer, Peer, tell_change
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.reload import Reload
from mpserverd.supervisor.states import ChildState
from mpserverd.version import VERSION

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


class Privilege(enum.Enum):
    READ = "read"
    CHANGE = "change"


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    name: str
    method: str
    privilege: Privilege
    help: str


COMMANDS: tuple[Command, ...] = (
    Command("ping", "ping", Privilege.READ, "Answers with the version and the pid."),
    Command("state", "state", Privilege.READ, "Facts, and the state and chunk tables as read-only descriptors."),
    Command("config", "config", Privilege.READ, "The settings in force."),
    Command("events", "list_events", Privilege.READ, "What happened after event number `since`."),
    Command("kick", "kick", Privilege.CHANGE, "Close the connections that `target` names."),
    Command("pause", "pause", Privilege.CHANGE, "Stop reading the connections that `target` names."),
    Command("resume", "resume", Privilege.CHANGE, "Read them again."),
    Command("drain", "drain", Privilege.CHANGE, "Let no new connections in; the others go on."),
    Command("undrain", "undrain", Privilege.CHANGE, "Let new connections in again."),
    Command("quarantine", "list_quarantine", Privilege.READ, "Clients that are refused because workers died on them."),
    Command("release", "release", Privilege.CHANGE, "Let the quarantined clients that `target` names in again."),
    Command("reload", "reload_config", Privilege.CHANGE, "Read the configuration again and take it over."),
    Command("leave", "leave", Privilege.CHANGE, "Exit at once; everything waits in systemd's store for a successor."),
    Command("loglevel", "set_log_level", Privilege.CHANGE, "Change the log `level` of all processes until a reload."),
)

_BY_NAME = {command.name: command for command in COMMANDS}


class Commands:
    """Answers requests; every MpserverdError becomes a fault with its exit code."""

    def __init__(
        self,
        core: Core,
        children: Children,
        connections: Connections,
        accepting: Accepting,
        reload: Reload,
        leave: Callable[[str], None],
        keep_facts: Callable[[], None],
    ) -> None:
        """``leave`` says who asked, and raises MpserverdError when it cannot be. ``keep_facts`` keeps what changed for
        the next supervisor."""
        self._leave = leave
        self._keep_facts = keep_facts
        self._core = core
        self._children = children
        self._connections = connections
        self._accepting = accepting
        self._reload = reload

    def answer(self, request: Request, peer: Peer) -> Answer:
        command = _BY_NAME.get(request.command)
        if command is None:
            known = ", ".join(sorted(_BY_NAME))
            return Answer(Reply.fault(f"unknown command {request.command!r:.60}; there are {known}", 2))
        if command.privilege is Privilege.CHANGE:
            tell_change(request, peer)
        handler: Callable[[dict[str, Any]], Any] = getattr(self, command.method)
        try:
            result = handler(request.arguments)
        except MpserverdError as error:
            return Answer(Reply.fault(str(error), error.exit_code))
        return result if isinstance(result, Answer) else Answer(Reply(True, result))

    # -- reading

    def ping(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"version": VERSION, "pid": os.getpid()}

    def state(self, _: dict[str, Any]) -> Answer:
        """The tables are opened again, so that whoever gets them cannot write."""
        fds = tuple(
            os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            for fd in (self._core.state.fd, self._core.arena.table.fd)
        )
        return Answer(Reply(True, self.facts()), fds)

    def facts(self) -> dict[str, Any]:
        """What the tables do not say."""
        core, words = self._core, self._core.state.words
        storer = self._children.storer()
        return {
            "schema_version": SCHEMA_VERSION,
            "version": VERSION,
            "pid": os.getpid(),
            "started_unix_ns": words[Head.STARTED_UNIX_NS],
            "uptime_s": (time.monotonic_ns() - words[Head.STARTED_MONO_NS]) / 1e9,
            "stopping": core.stopping,
            "max_clients": core.max_clients,
            "heartbeat_timeout_s": core.config.server.heartbeat_timeout_s,
            "limits": {"clients": core.clients_max, "chunks": core.arena.count, "chunk_bytes": core.arena.chunk_bytes},
            "slots": {"supervisor": SUPERVISOR_SLOT, "storer": STORER_SLOT, "first_worker": FIRST_WORKER_SLOT},
            "spool": core.config.spool.path,
            "sync": str(core.config.spool.sync),
            "reload_error": self._reload.last_error or None,
            "listeners": self._listener_facts(),
            "clients": [client.id for client in core.config.clients],
            "workers": [_child_facts(child) for child in self._children.workers()],
            "storer": _child_facts(storer) if storer is not None else self._foreign_storer(),
        }

    def _foreign_storer(self) -> dict[str, Any] | None:
        """The storer of an earlier supervisor, while it hangs in the kernel and has the spool. Whose pid it is nobody
        here knows."""
        if self._core.may_store:
            return None
        names = {"index": 0, "name": "storer", "pid": 0, "state": ChildState.STUCK.value, "restarts": 0}
        return {**names, "slot": STORER_SLOT, "connections": 0, "wanted": True}

    def _listener_facts(self) -> dict[str, dict[str, Any]]:
        bound = {listener.id: listener.bound for listener in self._accepting.listeners()}
        return {
            str(number): {
                "name": settings.name,
                "address": bound.get(number),
                "protocol": str(settings.protocol),
                "packet_size": settings.packet_size,
                "layout": settings.layout,
                "store": settings.store,
                "on_full": str(settings.on_full),
            }
            for number, settings in self._core.listeners.items()
        }

    def config(self, _: dict[str, Any]) -> Any:
        return as_dict(self._core.config)

    def list_events(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        since = arguments.get("since", 0)
        if isinstance(since, bool) or not isinstance(since, int):
            raise UsageError(f"since is {since!r:.60}, not an event's number")
        return self._core.events.since(since)

    def list_quarantine(self, _: dict[str, Any]) -> list[dict[str, Any]]:
        return [dataclasses.asdict(entry) for entry in self._connections.quarantine.entries(time.time())]

    # -- changing

    def drain(self, _: dict[str, Any]) -> dict[str, Any]:
        return self._set_draining(True)

    def undrain(self, _: dict[str, Any]) -> dict[str, Any]:
        return self._set_draining(False)

    def _set_draining(self, draining: bool) -> dict[str, Any]:
        core = self._core
        if core.stopping:
            raise MpserverdError("the daemon stops")
        if core.draining != draining:
            core.draining = draining
            core.show_phase()
            self._keep_facts()
            core.note(
                logger, logging.INFO, "draining" if draining else "serving again", connections=len(self._connections)
            )
        return {"draining": draining, "connections": len(self._connections)}

    def release(self, arguments: dict[str, Any]) -> dict[str, Any]:
        target = arguments.get("target")
        if not isinstance(target, str) or not target:
            raise UsageError("name a client as `quarantine list` shows it, or all")
        released = self._connections.quarantine.release(target)
        if not released and target != "all":
            raise MpserverdError(f"nobody in quarantine is called {target!r:.200}")
        self._keep_facts()
        return {"released": released}

    def kick(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._each(arguments, self._connections.kick)

    def pause(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._each(arguments, self._connections.pause)

    def resume(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._each(arguments, self._connections.resume)

    def _each(self, arguments: dict[str, Any], change: Callable[[Connection], None]) -> dict[str, Any]:
        target = arguments.get("target")
        if not isinstance(target, str) or not target:
            raise UsageError("name a client, a stream, a peer, the number of a connection, or all")
        found = [connection for connection in self._connections.all() if self._matches(connection, target)]
        if not found and target != "all":
            raise MpserverdError(f"no connection is called {target!r:.200}")
        told = [{"row": each.row, "peer": each.peer, "stream": self._connections.stream_name(each)} for each in found]
        for connection in found:
            change(connection)
        return {"connections": told}

    def _matches(self, connection: Connection, target: str) -> bool:
        names = ("all", str(connection.row), connection.client, connection.peer, str(connection.address))
        return target in names or target == self._connections.stream_name(connection) or _same(connection, target)

    def reload_config(self, _: dict[str, Any]) -> dict[str, Any]:
        return self._reload.request()

    def leave(self, _: dict[str, Any]) -> dict[str, Any]:
        count = len(self._connections)
        self._leave("the command leave")
        return {"left": True, "connections": count}

    def set_log_level(self, arguments: dict[str, Any]) -> dict[str, Any]:
        level = arguments.get("level")
        if level not in list(LogLevel):
            raise UsageError(f"log level {level!r:.60} is none of {', '.join(LogLevel)}")
        log.set_level(level)
        self._core.log_level = level
        self._children.broadcast(Kind.LOG_LEVEL, {"level": level})
        return {"level": level}


def _same(connection: Connection, target: str) -> bool:
    """Another spelling of the peer's address."""
    try:
        return connection.address == ipaddress.ip_address(target.strip("[]"))
    except ValueError:
        return False


def _child_facts(child: Child) -> dict[str, Any]:
    return {
        "index": child.index,
        "name": child.name,
        "pid": child.pid if child.state.alive else 0,
        "state": child.state.value,
        "restarts": child.restarts,
        "slot": child.slot,
        "connections": len(child.rows),
        "wanted": child.wanted,
    }

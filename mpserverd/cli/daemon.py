"""The command ``mpserverd``: reads its configuration and runs the daemon, in the foreground unless told otherwise.

Faults of the operator and of the machine end in lines that begin with ``mpserverd:`` and an exit code, never in a
traceback. What is heavy is imported only after the configuration was found to be fine.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mpserverd import log
from mpserverd.config.load import load
from mpserverd.config.rules import arena_bytes_min
from mpserverd.config.schema import Config, LogTarget
from mpserverd.config.show import listing
from mpserverd.errors import MpserverdError, StartError, UsageError
from mpserverd.version import VERSION

DEFAULT_CONFIG = "/etc/mpserverd/mpserverd.toml"
EXIT_INTERRUPTED = 130
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_BACKGROUND_KEYS = ("user", "group", "nice")

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 fine, 1 could not start or run, 2 bad usage or configuration."""
    # numpy starts a thread a core for linear algebra that is not used here, and threads and forks do not mix.
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = "1"
    _fill_standard_descriptors()
    arguments = _parser().parse_args(argv)
    try:
        return _dispatch(arguments)
    except MpserverdError as error:
        _complain(str(error))
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}")
        return StartError.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED


def _fill_standard_descriptors() -> None:
    """Open /dev/null as 0, 1 and 2 where they are closed: else a socket gets number 2, and log lines with it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpserverd",
        description="Receives, stores and accounts for small packets from many TCP clients.",
        epilog="Exit codes: 0 fine, 1 could not start or run, 2 bad usage or configuration.",
    )
    parser.add_argument("--config", metavar="FILE", default=DEFAULT_CONFIG, help="default: %(default)s")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="overrides the files, such as server.workers=2 or listener.0.address=127.0.0.1:0; may be repeated",
    )
    parser.add_argument(
        "--check-config", action="store_true", help="say what is wrong with the configuration, and leave"
    )
    parser.add_argument("--daemon", action="store_true", help="run in the background; not needed under systemd")
    parser.add_argument(
        "--pidfile", metavar="FILE", help="with --daemon: file that holds the pid and bars a second start"
    )
    parser.add_argument("--help-options", action="store_true", help="list every key of the configuration, and leave")
    parser.add_argument("--version", action="version", version=f"mpserverd {VERSION}")
    return parser


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.help_options:
        print(listing(), end="")
        return 0
    if arguments.pidfile is not None and not arguments.daemon:
        raise UsageError("--pidfile is for --daemon only")
    # The background's working directory is /, and a reload reads the same files.
    path = Path(arguments.config).absolute()
    overrides = tuple(arguments.overrides)
    config = load(path, overrides)
    if arguments.check_config:
        print(summary(config))
        return 0
    pidfile = Path(arguments.pidfile).absolute() if arguments.pidfile else None

    def run(on_ready: Callable[[], None]) -> int:
        return _run(config, lambda: load(path, overrides), on_ready, in_background=arguments.daemon)

    if arguments.daemon:
        from mpserverd.cli import background  # noqa: PLC0415  (detaching is not needed under systemd)

        return background.start(config, pidfile, run, _complain)
    return run(lambda: None)


def _run(
    config: Config, reload_config: Callable[[], Config], on_ready: Callable[[], None], *, in_background: bool
) -> int:
    """Run the supervisor; what ends it is in the log too, wherever that goes."""
    log.setup(config.log, process="supervisor")
    ignored = [key for key in _BACKGROUND_KEYS if getattr(config.server, key)]
    if ignored and not in_background:
        log.event(_log, logging.WARNING, "settings are for --daemon only and are not applied", keys=ignored)
    was_ready = False

    def note_ready() -> None:
        nonlocal was_ready
        was_ready = True
        on_ready()

    try:
        return _supervise(config, reload_config, note_ready)
    except (MpserverdError, OSError) as error:
        if not was_ready:
            if in_background or LogTarget.STDERR not in config.log.target:
                log.event(_log, logging.ERROR, "start failed", reason=str(error))
            raise
        _log_own_fault()
        return StartError.exit_code
    except Exception:
        _log_own_fault()
        return StartError.exit_code


def _log_own_fault() -> None:
    log.event(_log, logging.CRITICAL, "error of the program itself", message_id=log.MessageId.OUR_FAULT, exc_info=True)


def _supervise(config: Config, reload_config: Callable[[], Config], on_ready: Callable[[], None]) -> int:
    # Imported here because they bring numpy: after the variables above, and not for --check-config.
    import mpserverd.storer.main  # noqa: PLC0415
    import mpserverd.supervisor.main  # noqa: PLC0415
    import mpserverd.worker.main  # noqa: PLC0415

    return mpserverd.supervisor.main.run(
        config,
        reload_config=reload_config,
        programs={"worker": mpserverd.worker.main.run, "storer": mpserverd.storer.main.run},
        on_ready=on_ready,
    )


def _complain(text: str) -> None:
    for line in text.splitlines() or [""]:
        print(f"mpserverd: {line}", file=sys.stderr)


def summary(config: Config) -> str:
    """What --check-config prints when nothing is wrong."""
    server, buffers, spool = config.server, config.buffers, config.spool
    lines = [
        "configuration is fine",
        f"  {server.workers} workers, at most {server.max_clients} clients",
        f"  {buffers.bytes} bytes of shared memory (at least {arena_bytes_min(config)} for so many)",
    ]
    for listener in config.listeners:
        layout = f", layout {listener.layout}" if listener.layout else ""
        fate = f"stored, when memory is full {listener.on_full}" if listener.store else "not stored"
        lines.append(
            f"  listener {listener.name}: {listener.address}, {listener.protocol}, "
            f"packets of {listener.packet_size} bytes{layout}, {fate}"
        )
    bound = f"at most {spool.max_bytes} bytes" if spool.max_bytes else "no limit"
    lines.append(f"  spool {spool.path}: {bound}, {spool.min_free_bytes} bytes stay free, sync {spool.sync}")
    return "\n".join(lines)

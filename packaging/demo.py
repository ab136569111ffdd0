"""The demo behind ``make run``: a daemon with a spool of its own, some clients, and the accounts at the end.

Rules: everything it makes lies in two directories of its own (the spool under build/, where the file system is a real
one; the control socket under the temporary directory, because its path must be short) and is removed at the end, also
after Ctrl-C. It exits 0 only when the load reached its rate, every byte was found again, and the ledger balances.

It knows the three programs by their command lines only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = pathlib.Path(sys.executable).parent
START_DEADLINE_S = 20.0
STOP_DEADLINE_S = 30.0
EXIT_INTERRUPTED = 130

CONFIG = """\
[server]
workers = 4
max_clients = {max_clients}
control_socket = "{socket}"

[spool]
path = "{spool}"
max_bytes = {spool_bytes_max}

[log]
level = "info"
target = ["stderr"]

[layout.demo]
size = {packet_size}
fields = {fields}
{checks}
[[listener]]
name = "demo"
address = "127.0.0.1:0"
protocol = "raw"
layout = "demo"
"""
SPOOL_BYTES_MAX = 4 << 30


class DemoError(Exception):
    """The text is for the user."""


def main() -> int:
    """Run the demo; the exit code says whether everything was as promised."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    arguments = parse_arguments()
    try:
        with scratch_directories() as (spool, runtime):
            return demonstrate(arguments, spool, runtime)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted, everything is stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start a daemon, push packets into it, and account for every one.")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--duration", type=float, default=10.0, help="seconds")
    parser.add_argument("--rate", type=float, default=10_050.0, help="packets/s a client")
    parser.add_argument("--packet-size", type=int, default=16, help="bytes")
    return parser.parse_args()


@contextlib.contextmanager
def scratch_directories() -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A directory for the spool and one for the socket and the log; both are gone afterwards."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    spool = pathlib.Path(tempfile.mkdtemp(prefix="demo-", dir=build))
    runtime = pathlib.Path(tempfile.mkdtemp(prefix="mpserverd-demo-"))
    try:
        yield spool, runtime
    finally:
        shutil.rmtree(spool, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)


def demonstrate(arguments: argparse.Namespace, spool: pathlib.Path, runtime: pathlib.Path) -> int:
    socket_path = runtime / "control.sock"
    config = runtime / "demo.toml"
    config.write_text(config_text(arguments, spool, socket_path))
    with daemon(config, runtime / "daemon.log") as process:
        port = wait_until_ready(process, socket_path, runtime / "daemon.log")
        print(f"mpserverd listens on 127.0.0.1:{port}, spool {spool.relative_to(ROOT)}\n", flush=True)
        load = run("mpload", "run", *load_options(arguments, port, spool), "--control-socket", str(socket_path))
        print(flush=True)
        print("mpserverctl streams", flush=True)
        run("mpserverctl", "--socket", str(socket_path), "streams")
        print("\nmpserverctl ledger", flush=True)
        ledger = run("mpserverctl", "--socket", str(socket_path), "ledger")
    if load or ledger or process.returncode:
        raise DemoError(
            f"not as promised: mpload exit {load}, ledger exit {ledger}, mpserverd exit {process.returncode}\n"
            + log_tail(runtime / "daemon.log")
        )
    print("\nEverything is stopped; every packet that was sent is accounted for.")
    return 0


def config_text(arguments: argparse.Namespace, spool: pathlib.Path, socket_path: pathlib.Path) -> str:
    """Packets of mpload begin with their number and, when there is room, with their scheduled time."""
    size = arguments.packet_size
    fields, checks = f'{{ content = "S{size}" }}', ""
    if size >= 16:
        rest = f', rest = "V{size - 16}"' if size > 16 else ""
        fields = f'{{ sequence = "<u8", time = "<u8"{rest} }}'
        checks = 'sequence = "sequence"\ntime = "time"\n'
    return CONFIG.format(
        max_clients=max(10, arguments.clients),
        socket=socket_path,
        spool=spool,
        spool_bytes_max=SPOOL_BYTES_MAX,
        packet_size=size,
        fields=fields,
        checks=checks,
    )


def load_options(arguments: argparse.Namespace, port: int, spool: pathlib.Path) -> list[str]:
    return [
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--clients", str(arguments.clients), "--duration", f"{arguments.duration:g}"),
        *("--rate", f"{arguments.rate:g}", "--packet-size", str(arguments.packet_size)),
        *("--verify", str(spool)),
    ]


@contextlib.contextmanager
def daemon(config: pathlib.Path, log: pathlib.Path) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, so that Ctrl-C reaches the clients first and the daemon is stopped in order."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [BIN / "mpserverd", "--config", config],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], socket_path: pathlib.Path, log: pathlib.Path) -> int:
    """The port that the kernel chose, once the daemon says that it serves."""
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"mpserverd did not start, exit code {process.returncode}\n{log_tail(log)}")
        answer = subprocess.run(
            [BIN / "mpserverctl", "--socket", socket_path, "--json", "stats"],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode == 0:
            return int(json.loads(answer.stdout)["listeners"][0]["port"])
        time.sleep(0.1)
    raise DemoError(f"mpserverd was not ready after {START_DEADLINE_S:g} s\n{log_tail(log)}")


def run(program: str, *arguments: str) -> int:
    """Run one of our programs in the foreground; its exit code."""
    return subprocess.run([BIN / program, *arguments], check=False).returncode


def log_tail(log: pathlib.Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main())

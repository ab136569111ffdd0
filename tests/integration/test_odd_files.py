"""One stream's directory breaks under the daemon: it alone begins anew, everybody is stored, and a start succeeds."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from tests.integration import senders
from tests.integration.driver import Daemon, connect

CONTENT = senders.payload(5, 160_000)
CLIENTS = {
    "client": [
        {"id": "odd", "address": "127.0.0.2"},
        {"id": "innocent", "address": "127.0.0.3"},
    ]
}


def send(daemon: Daemon, lives: int) -> None:
    """Both clients once more."""
    before = daemon.account("durable_bytes")
    for source in ("127.0.0.2", "127.0.0.3"):
        with connect(daemon.port(), source=source) as client:
            client.sendall(CONTENT)
    daemon.wait_until_served(2 * lives)
    daemon.wait_for_total("durable_bytes", before + 2 * len(CONTENT))
    daemon.wait_until_quiet()


@pytest.mark.parametrize("restart", [False, True])
def test_a_file_in_the_place_of_a_streams_directory_stops_that_stream_only(
    tmp_path: pathlib.Path, restart: bool
) -> None:
    with Daemon(tmp_path, CLIENTS) as daemon:
        send(daemon, 1)
        if restart:
            daemon.stop()
        odd = daemon.spool / "streams" / "odd"
        shutil.rmtree(odd)
        odd.write_text("what is this?")
        if restart:
            daemon.start()
        storer = daemon.pid_of("storer")
        send(daemon, 1 if restart else 2)
        assert daemon.pid_of("storer") == storer, "the storer never died"
        names = sorted(path.name.split("@")[0] for path in (daemon.spool / "streams").iterdir())
        assert names == ["innocent", "odd", "odd"]
        (line,) = daemon.log_lines("stream stopped: its files are not complete")
        assert f"{odd}: Not a directory" in line
        assert (daemon.spool / "streams" / "innocent" / f"{0:020d}.seg").read_bytes() == 2 * CONTENT
        daemon.stop()

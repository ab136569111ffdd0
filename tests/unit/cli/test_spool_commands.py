"""The five spool commands as an operator types them."""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from spool_writer import CREATED_NS, SAMPLE16, SpoolWriter, noise, samples

from mpserverd.cli.ctl import EXIT_READER_GONE
from mpserverd.cli.spool_commands import COMMANDS, add_parsers
from mpserverd.cli.spool_output import human_bytes
from mpserverd.errors import MpserverdError, SpoolError, UsageError


@dataclass
class Answer:
    code: int
    bytes: bytes

    @property
    def text(self) -> str:
        return self.bytes.decode()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--json", action="store_true")
    add_parsers(parser.add_subparsers(dest="command"))
    return parser.parse_args(words)


def run(spool: SpoolWriter, *words: str, json: bool = False) -> Answer:
    args = parse(*(["--json"] if json else []), *words, "--spool", str(spool.path))
    content = io.BytesIO()
    out = io.TextIOWrapper(content, write_through=True)
    return Answer(COMMANDS[args.command](args, out), content.getvalue())


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[SpoolWriter]:
    """``press-7``: 100 samples, of which 20 to 29 were dropped; ``oven``: 50 opaque packets of 3 bytes, in two
    epochs."""
    with SpoolWriter(tmp_path / "spool") as writer:
        number = writer.add(
            "press-7", samples(100), layout=SAMPLE16, cuts=[800], holes=[(320, 480, "dropped")], connected=True
        )
        writer.add_index(number, 0, [(160 * at, CREATED_NS + at * 10**9) for at in range(1, 6)])
        writer.add_index(number, 800, [(160 * at, CREATED_NS + at * 10**9) for at in range(6, 11)])
        writer.add("oven", noise(30, seed=5), packet_size=3, epoch="00000000000000b1")
        writer.add("oven", noise(150), packet_size=3, epoch="00000000000000b2")
        yield writer


def numbers(answer: Answer) -> list[int]:
    """Sequence numbers in the CSV output of read."""
    return [int(line.split(",")[1]) for line in answer.lines[1:]]


# --- streams


def test_streams_are_a_table_for_people(spool: SpoolWriter) -> None:
    answer = run(spool, "streams")
    assert answer.code == 0
    assert answer.lines[0].split()[:4] == ["NAME", "EPOCH", "PACKET", "PACKETS"]
    assert answer.lines[1].split()[:4] == ["oven", "00000000000000b2", "3", "50"]
    assert answer.lines[2].split()[-2:] == ["connected", "2023-11-14T22:13:20Z"]
    assert answer.lines[3].startswith("2 streams, ")


def test_streams_are_a_list_of_objects_for_programs(spool: SpoolWriter) -> None:
    listed = json.loads(run(spool, "streams", "press*", json=True).text)
    assert [(info["name"], info["durable_bytes"], info["holes"]) for info in listed] == [("press-7", 1440, 1)]


def test_older_epochs_are_listed_by_the_name_that_opens_them(spool: SpoolWriter) -> None:
    names = [line.split()[0] for line in run(spool, "streams", "oven", "--all-epochs").lines[1:-1]]
    assert names == ["oven@00000000000000b1", "oven"]
    assert len(run(spool, "read", names[0]).lines) == 11


def test_a_spool_without_streams_is_an_empty_table(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "empty") as writer:
        assert run(writer, "streams").lines[-1] == "0 streams, 0 B held"
        assert json.loads(run(writer, "streams", json=True).text) == []


# --- read and tail


def test_read_prints_named_columns_and_says_what_is_missing(spool: SpoolWriter) -> None:
    lines = run(spool, "read", "press-7", "--packets", "18:32").lines
    assert lines[0].split() == ["index", "sequence", "time"]
    assert lines[1].split() == ["18", "18", "2023-11-14T22:13:20.001800000Z"]
    assert lines[3] == "-- 10 packets dropped: 20 to 29"
    assert lines[4].split()[0] == "30"
    assert len({len(line) for line in lines if not line.startswith("--")}) == 1


def test_opaque_packets_are_hexadecimal(spool: SpoolWriter) -> None:
    lines = run(spool, "read", "oven", "--packets", "0:2").lines
    assert [line.split() for line in lines] == [["index", "packet"], ["0", noise(3).hex()], ["1", noise(6)[3:].hex()]]


def test_raw_is_the_packets_byte_for_byte(spool: SpoolWriter) -> None:
    content = samples(100)
    assert run(spool, "read", "press-7", "--format", "raw").bytes == content[:320] + content[480:]
    assert run(spool, "tail", "press-7", "-n", "3", "--format", "raw").bytes == content[-48:]
    assert run(spool, "export", "press-7", "--format", "raw", "--output", "-").bytes == content[:320] + content[480:]


def test_raw_is_not_written_to_a_terminal(spool: SpoolWriter) -> None:
    args = parse("read", "oven", "--format", "raw", "--spool", str(spool.path))
    leader, terminal = os.openpty()
    with open(terminal, "w") as out, open(leader, "rb"), pytest.raises(UsageError, match="garble"):
        COMMANDS["read"](args, out)


def test_json_lines_hold_numbers_text_and_holes(spool: SpoolWriter) -> None:
    found = [json.loads(line) for line in run(spool, "read", "press-7", "--packets", "19:31", json=True).lines]
    assert found == [
        {"index": 19, "sequence": 19, "time": "2023-11-14T22:13:20.001900000Z"},
        {"hole": "dropped", "index": 20, "packets": 10},
        {"index": 30, "sequence": 30, "time": "2023-11-14T22:13:20.003000000Z"},
    ]


def test_json_has_no_word_that_is_no_json(spool: SpoolWriter) -> None:
    layout = {"name": "x", "size": 8, "fields": {"f": "<f8"}}
    spool.add("nan", struct.pack("<dd", float("nan"), 0.5), packet_size=8, layout=layout)
    assert [json.loads(line)["f"] for line in run(spool, "read", "nan", json=True).lines] == [None, 0.5]


@pytest.mark.parametrize(
    ("packets", "expected"),
    [
        ("3:6", [3, 4, 5]),
        ("97:", [97, 98, 99]),
        (":2", [0, 1]),
        ("5", [5]),
        ("-2:", [98, 99]),
        ("-3:-1", [97, 98]),
        ("-1", [99]),
        ("98:500", [98, 99]),
        ("500:", []),
        ("6:3", []),
    ],
)
def test_packets_are_chosen_by_index(spool: SpoolWriter, packets: str, expected: list[int]) -> None:
    assert numbers(run(spool, "read", "press-7", "--format", "csv", "--packets", packets)) == expected


def test_packets_are_chosen_by_time(spool: SpoolWriter) -> None:
    def read(*words: str) -> list[int]:
        return numbers(run(spool, "read", "press-7", "--format", "csv", *words))

    assert read("--since", "2023-11-14T22:13:25Z", "--until", "1700000006") == list(range(50, 60))
    assert read("--until", "1700000001") == list(range(10))
    assert read("--since", "-5m") == []
    assert read("--since", "1700000005", "--packets", ":52") == [50, 51]


@pytest.mark.parametrize("packets", ["", "-", "a:b", "1:2:3", "1.5"])
def test_a_range_that_is_none_is_bad_usage(packets: str) -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse("read", "x", f"--packets={packets}")


def test_tail_prints_the_newest_packets(spool: SpoolWriter) -> None:
    assert numbers(run(spool, "tail", "press-7", "--format", "csv")) == list(range(90, 100))
    assert numbers(run(spool, "tail", "press-7", "--format", "csv", "-n", "2")) == [98, 99]
    assert numbers(run(spool, "tail", "press-7", "--format", "csv", "-n", "0")) == []
    assert len(numbers(run(spool, "tail", "press-7", "--format", "csv", "-n", "1000"))) == 90


def test_tail_goes_on_with_what_comes_until_interrupted(spool: SpoolWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter(range(3))

    def wait(_: float) -> None:
        number = next(waits)
        if number == 2:
            raise KeyboardInterrupt
        spool.append(1, samples(2, first=100 + 2 * number))

    monkeypatch.setattr("mpserverd.streams.reader.time.sleep", wait)
    answer = run(spool, "tail", "press-7", "-f", "-n", "1", "--format", "csv")
    assert (answer.code, numbers(answer)) == (0, [99, 100, 101, 102, 103])


# --- export


def test_export_says_what_it_wrote_and_what_was_not_there(spool: SpoolWriter, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    answer = run(spool, "export", "press-7", "--format", "npy", "--output", str(output), "--packets", "10:40")
    assert answer.text == f"{output}: 20 packets, 320 B; not there: 10 packets in 1 hole\n"
    assert np.load(output)["sequence"].tolist() == [*range(10, 20), *range(30, 40)]


def test_export_answers_programs_with_one_object(spool: SpoolWriter, tmp_path: Path) -> None:
    output = str(tmp_path / "out.csv")
    found = json.loads(run(spool, "export", "press-7", "--format", "csv", "--output", output, json=True).text)
    assert (found["packets"], found["first_index"], found["end_index"], found["hole_packets"]) == (90, 0, 100, 10)


# --- verify


def test_verify_of_a_sound_spool_says_what_could_not_be_compared(spool: SpoolWriter) -> None:
    answer = run(spool, "verify")
    assert answer.code == 0
    assert answer.lines[2] == (
        "press-7: ok, 2 segments, 800 B match their checksums, 800 B have none yet, 1 hole of 160 B"
    )
    assert answer.lines[3].endswith("980 B could not be compared (no checksum yet); nothing is wrong")


def test_verify_answers_no_when_something_is_wrong(spool: SpoolWriter) -> None:
    path = spool.segment_paths(1)[0]
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    answer = run(spool, "verify")
    assert answer.code == 1
    assert f"  {path} has other content" in answer.text
    assert answer.lines[-2].endswith("1 finding in 1 stream")
    assert answer.lines[-1] == "next: stop the daemon and run mpserverctl repair --checksums"
    report = run(spool, "verify", json=True)
    found = json.loads(report.text)
    assert (report.code, found["fine"], found["totals"]["findings"]) == (1, False, 1)
    assert [stream["fine"] for stream in found["streams"]] == [True, True, False]
    assert [stream["other_content"] for stream in found["streams"]] == [0, 0, 1]
    assert (found["findings"], found["next_step"]) == ([], answer.lines[-1].removeprefix("next: "))


def test_verify_names_repair_for_what_needs_no_checksums(spool: SpoolWriter) -> None:
    spool.segment_paths(1)[1].unlink()
    assert run(spool, "verify").lines[-1] == "next: stop the daemon and run mpserverctl repair"


def test_a_catalog_that_is_lost_or_garbage_is_a_finding_with_a_next_step(spool: SpoolWriter) -> None:
    catalog = spool.path / "catalog.sqlite"
    spool.close()
    catalog.write_bytes(b"garbage " * 1000)
    answer = run(spool, "verify")
    assert (answer.code, answer.lines[0]) == (1, "the spool itself: DAMAGED")
    assert "file is not a database" in answer.lines[1]
    catalog.unlink()
    answer = run(spool, "verify")
    assert answer.code == 1
    assert f"{catalog} is missing, but there are streams" in answer.lines[1]
    assert answer.lines[2].endswith("1 finding in the spool itself")
    assert answer.lines[3] == "next: stop the daemon and run mpserverctl repair"
    assert json.loads(run(spool, "verify", json=True).text)["findings"] == [answer.lines[1].strip()]


def test_what_lies_beside_the_streams_is_a_finding_of_the_spool_unless_some_streams_are_named(
    spool: SpoolWriter,
) -> None:
    (spool.path / "streams" / "stray").mkdir()
    answer = run(spool, "verify")
    assert (answer.code, answer.lines[-4]) == (1, "the spool itself: DAMAGED")
    assert answer.lines[-3] == f"  {spool.path / 'streams' / 'stray'} belongs to no stream of the catalog"
    assert run(spool, "verify", "oven").code == 0


# --- errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["read", "press-8"], "nearest is press-7"),
        (["tail", "zzz"], "the spool has 2 streams"),
        (["verify", "press"], "no stream press"),
        (["read", "press-7", "--since", "soon"], "'soon' is no time"),
        (["export", "press-7", "--format", "raw", "--output", "/nowhere/at/all"], "cannot write"),
    ],
)
def test_errors_are_one_clear_line(spool: SpoolWriter, words: list[str], message: str) -> None:
    with pytest.raises(MpserverdError, match=message) as caught:
        run(spool, *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["read", "press-7", "--until", "0"], ["verify"], ["streams"]])
def test_a_spool_that_is_not_there_is_an_error_with_exit_code_1(tmp_path: Path, words: list[str]) -> None:
    args = parse(*words, "--spool", str(tmp_path / "nowhere"))
    with pytest.raises(SpoolError, match="there is no spool") as caught:
        COMMANDS[args.command](args, io.StringIO())
    assert caught.value.exit_code == 1


def test_the_daemon_is_asked_for_its_spool_when_none_is_named(spool: SpoolWriter) -> None:
    args = parse("streams")
    args.daemon_spool = lambda: str(spool.path)
    out = io.StringIO()
    assert COMMANDS["streams"](args, out) == 0
    assert "press-7" in out.getvalue()


def test_a_reader_that_goes_away_is_no_error(spool: SpoolWriter) -> None:
    spool.add("long", noise(16 * 50_000))
    words = [sys.executable, "-m", "mpserverd.cli.ctl", "read", "long", "--spool", str(spool.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().split() == [b"index", b"packet"]
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == EXIT_READER_GONE


@pytest.mark.parametrize("jobs", ["0", "65", "x"])
def test_jobs_are_bounded(jobs: str) -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse("verify", "--jobs", jobs)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1536, "1.50 KiB"), (10 << 20, "10.0 MiB"), (5 << 50, "5.00 PiB")],
)
def test_sizes_have_three_digits_and_a_unit(count: int, text: str) -> None:
    assert human_bytes(count) == text


# --- output that cannot be written


@pytest.mark.parametrize("words", [["read", "press-7"], ["read", "oven", "--format", "raw"], ["streams"], ["verify"]])
def test_a_full_output_is_not_blamed_on_the_spool(spool: SpoolWriter, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "mpserverd.cli.ctl", "--spool", str(spool.path), *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (found.returncode, found.stderr) == (1, "mpserverctl: standard output: No space left on device\n")

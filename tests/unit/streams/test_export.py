"""Exports, read back by what is not ours: numpy, csv, pyarrow, the bytes that were written."""

from __future__ import annotations

import csv
import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spool_writer import CREATED_NS, SAMPLE16, SpoolWriter, noise, samples

from mpserverd.errors import MpserverdError, UsageError
from mpserverd.streams import open_stream
from mpserverd.streams.export import export_file, export_packets, npy_header

MIXED = {
    "name": "mixed",
    "size": 40,
    "fields": {"when": ">i8", "half": "<f2", "single": ">f4", "on": "?", "word": "S6", "blob": "V3", "number": "<i2"},
    "sequence": "number",
    "time": "when",
}


def mixed(count: int) -> bytes:
    """Packets of MIXED with 14 bytes that no field names."""
    rows = (
        struct.pack(">q", CREATED_NS + at)
        + struct.pack("<e", at / 2)
        + struct.pack(">f", at / 4)
        + bytes([at % 2])
        + f"w,{at}".encode().ljust(6, b"\0")
        + bytes([at % 256] * 3)
        + struct.pack("<h", -at)
        + noise(14)
        for at in range(count)
    )
    return b"".join(rows)


def exported(spool: SpoolWriter, kind: str, *bounds: int) -> Path:
    output = spool.path.parent / f"out.{kind}"
    with open_stream("a", spool=spool.path) as stream:
        export_file(stream, output, kind, *bounds)
    return output


def test_raw_is_the_packets_and_nothing_else(spool: SpoolWriter) -> None:
    content = noise(7 * 1000)
    spool.add("a", content, packet_size=7, cuts=[100, 3000], holes=[(70, 77, "dropped")])
    output = spool.path.parent / "out"
    with open_stream("a", spool=spool.path) as stream:
        count = export_file(stream, output, "raw", 5, 900)
    assert output.read_bytes() == content[35:70] + content[77:6300]
    assert (count.packets, count.holes, count.hole_packets) == (894, 1, 1)
    assert (count.first_index, count.end_index) == (5, 900)


def test_npy_is_what_numpy_loads_and_maps(spool: SpoolWriter) -> None:
    content = samples(1000)
    spool.add("a", content, layout=SAMPLE16, cuts=[1000, 1001], holes=[(160, 320, "lost")])
    output = exported(spool, "npy")
    for mode in (None, "r"):
        loaded: Any = np.load(output, mmap_mode=mode)
        assert loaded["sequence"].tolist() == [*range(10), *range(20, 1000)]
        assert loaded.tobytes() == content[:160] + content[320:]


def test_npy_of_opaque_packets_needs_no_pickle(spool: SpoolWriter) -> None:
    content = noise(24 * 100)
    spool.add("a", content, packet_size=24)
    loaded = np.load(exported(spool, "npy"), allow_pickle=False)
    assert (loaded.dtype, loaded.tobytes()) == (np.dtype("V24"), content)


def test_npy_of_nothing_is_an_empty_array(spool: SpoolWriter) -> None:
    spool.add("a", b"")
    assert np.load(exported(spool, "npy")).shape == (0,)


def test_npy_headers_are_as_long_for_any_count_and_load_for_any_names() -> None:
    many = np.dtype([(f"field{at:060d}", "u1") for at in range(250)] + [("größe", "u1")])
    huge = np.dtype([(f"f{at:04d}", "u1") for at in range(5000)])
    for dtype in (np.dtype("V7"), many, huge):
        header = npy_header(dtype, 3)
        assert len(header) == len(npy_header(dtype, 10**19)) == -(-len(header) // 64) * 64
        content = bytes(range(256)) * (dtype.itemsize * 3 // 256 + 1)
        loaded = np.load(io.BytesIO(header + content[: dtype.itemsize * 3]), max_header_size=1 << 20)
        assert (loaded.dtype, len(loaded)) == (dtype, 3)


def test_csv_has_a_header_and_one_line_a_packet(spool: SpoolWriter) -> None:
    spool.add("a", mixed(50), packet_size=40, layout=MIXED, holes=[(40, 80, "lost")])
    rows = list(csv.DictReader(io.StringIO(exported(spool, "csv").read_text(), newline="")))
    assert [row["index"] for row in rows] == ["0", *map(str, range(2, 50))]
    assert rows[3] == {
        "index": "4",
        "when": "2023-11-14T22:13:20.000000004Z",
        "half": "2.0",
        "single": "1.0",
        "on": "0",
        "word": "w,4",
        "blob": "040404",
        "number": "-4",
    }


def test_csv_of_opaque_packets_is_hexadecimal(spool: SpoolWriter) -> None:
    spool.add("a", b"\x00\x01\x02\xfd\xfe\xff", packet_size=3)
    assert exported(spool, "csv").read_text() == "index,packet\n0,000102\n1,fdfeff\n"


def test_times_beyond_the_calendar_stay_numbers_in_csv(spool: SpoolWriter) -> None:
    spool.add("a", struct.pack("<QQQQ", 1, 2**64 - 1, 2, CREATED_NS), layout=SAMPLE16)
    assert exported(spool, "csv").read_text().splitlines()[1:] == [
        f"0,1,{2**64 - 1}",
        "1,2,2023-11-14T22:13:20Z",
    ]


def test_a_field_called_index_keeps_its_name(spool: SpoolWriter) -> None:
    layout = {"name": "x", "size": 1, "fields": {"index": "u1"}}
    spool.add("a", b"\x07", packet_size=1, layout=layout)
    assert exported(spool, "csv").read_text() == "packet_index,index\n0,7\n"


def test_parquet_has_one_typed_column_a_field(spool: SpoolWriter) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    spool.add("a", mixed(50), packet_size=40, layout=MIXED, cuts=[101, 103], holes=[(40, 80, "lost")])
    table = pq.read_table(exported(spool, "parquet"))
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types["when"] == "timestamp[ns, tz=UTC]"
    assert (types["index"], types["number"], types["blob"]) == ("uint64", "int16", "fixed_size_binary[3]")
    assert table["index"].to_pylist() == [0, *range(2, 50)]
    assert table["when"].cast("int64").to_pylist()[:2] == [CREATED_NS, CREATED_NS + 2]
    assert table["half"].to_pylist()[:2] == [0.0, 1.0]
    assert table["number"].to_pylist()[-1] == -49
    assert table["word"].to_pylist()[1] == b"w,2\0\0\0"


def test_parquet_row_groups_are_bounded(spool: SpoolWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    parquet = pytest.importorskip("mpserverd.streams.export_parquet")
    monkeypatch.setattr(parquet, "ROW_GROUP_PACKETS", 30)
    content = noise(7 * 100)
    spool.add("a", content, packet_size=7, cuts=[100, 400])
    file = pq.ParquetFile(exported(spool, "parquet"))
    assert [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)] == [30, 30, 30, 10]
    assert b"".join(file.read()["packet"].to_pylist()) == content


def test_parquet_of_nothing_is_an_empty_table_and_odd_times_are_null(spool: SpoolWriter) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    number = spool.add("a", b"", layout=SAMPLE16)
    assert pq.read_table(exported(spool, "parquet")).num_rows == 0
    spool.append(number, struct.pack("<QQ", 1, 2**64 - 1))
    assert pq.read_table(exported(spool, "parquet"))["time"].to_pylist() == [None]


def test_parquet_without_pyarrow_names_the_package(spool: SpoolWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.add("a", noise(16))
    monkeypatch.setattr("mpserverd.streams.export.find_spec", lambda _: None)
    with pytest.raises(MpserverdError, match="needs pyarrow"):
        exported(spool, "parquet")
    assert sorted(os.listdir(spool.path.parent)) == ["spool"]


def test_a_failed_export_leaves_the_old_file_and_nothing_else(spool: SpoolWriter) -> None:
    number = spool.add("a", noise(160), cuts=[48])
    spool.segment_paths(number)[1].unlink()
    output = spool.path.parent / "out.raw"
    output.write_bytes(b"old")
    with pytest.raises(MpserverdError, match="is missing"):
        exported(spool, "raw")
    assert output.read_bytes() == b"old"
    assert sorted(os.listdir(spool.path.parent)) == ["out.raw", "spool"]


def test_a_full_disk_is_one_clear_line(spool: SpoolWriter) -> None:
    spool.add("a", noise(160))
    with open_stream("a", spool=spool.path) as stream, pytest.raises(MpserverdError, match="No space left"):
        export_file(stream, Path("/dev/full"), "raw")


def test_an_output_that_cannot_be_made_is_bad_usage(spool: SpoolWriter) -> None:
    spool.add("a", noise(160))
    with open_stream("a", spool=spool.path) as stream, pytest.raises(UsageError, match="cannot write"):
        export_file(stream, spool.path / "nowhere" / "out", "raw")


def test_a_pipe_takes_raw_but_not_npy(spool: SpoolWriter) -> None:
    content = noise(160)
    spool.add("a", content)
    reader, writer = os.pipe()
    with open_stream("a", spool=spool.path) as stream, open(reader, "rb") as back, open(writer, "wb") as file:
        with pytest.raises(UsageError, match="not a pipe"):
            export_packets(stream, file, "npy")
        export_packets(stream, file, "raw")
        file.close()
        assert back.read() == content


def test_a_device_is_written_to_and_not_replaced(spool: SpoolWriter) -> None:
    spool.add("a", noise(160))
    with open_stream("a", spool=spool.path) as stream:
        export_file(stream, Path("/dev/null"), "raw")
    assert Path("/dev/null").is_char_device()


def test_a_new_file_has_the_permissions_that_the_umask_leaves(spool: SpoolWriter) -> None:
    spool.add("a", noise(160))
    old = os.umask(0o027)
    try:
        assert exported(spool, "raw").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)


def test_progress_is_told_and_only_grows(spool: SpoolWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpserverd.streams.export.BATCH_BYTES", 160)
    spool.add("a", noise(1600))
    told: list[int] = []
    with open_stream("a", spool=spool.path) as stream:
        export_file(stream, spool.path.parent / "out", "raw", progress=told.append)
    assert told == list(range(10, 101, 10))


def test_reading_does_not_import_what_only_parquet_needs() -> None:
    code = "import sys, mpserverd.cli.spool_commands; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

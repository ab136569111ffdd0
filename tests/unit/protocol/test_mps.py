"""The lines of MPS/1: every rule and limit, and a million random inputs held against expressions of their own.

``HELLO`` and ``ANSWER`` below are written from the grammar in docs/protocol.md and share nothing with the module, so an
input that one of the two takes and the other one refuses is a failure. ``MPSERVERD_TEST_MPS_FUZZ`` is the number of
random inputs, ``MPSERVERD_TEST_SEED`` repeats a run.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.protocol import mps

FUZZ_INPUTS = int(os.environ.get("MPSERVERD_TEST_MPS_FUZZ", "1000000"))
SEED = int(os.environ.get("MPSERVERD_TEST_SEED", random.SystemRandom().randrange(2**32)))

HELLO = re.compile(
    rb"MPS/1 (?P<id>[A-Za-z0-9][A-Za-z0-9._-]{0,63}) (?P<size>[1-9][0-9]{0,4})"
    rb"(?P<options>(?: token=[!-~]{1,128}| epoch=[0-9a-f]{16}| first=(?:0|[1-9][0-9]{0,18})| new=1)*)\r?\n"
)
ANSWER = re.compile(
    rb"(?:OK (?P<ok>0|[1-9][0-9]{0,18}) (?P<level>durable|stored) (?P<epoch>[0-9a-f]{16})"
    rb"|ACK (?P<ack>0|[1-9][0-9]{0,18})"
    rb"|BYE (?P<bye>[a-z][a-z-]{0,31})(?: retry=(?P<retry>0|[1-9][0-9]{0,18}))?"
    rb"|ERR (?P<code>[a-z][a-z-]{0,31})(?: (?P<text>[^\n]*?))?)\r?"
)
TORN = (b"", b"\r", b"A", b"AC", b"ACK", b"ACK ")
FIRST_MAX = 4_611_686_018_427_387_904

GOOD = b"MPS/1 press-7 16"


def refusal(line: bytes) -> tuple[str, str]:
    with pytest.raises(mps.HelloError) as caught:
        mps.Hello.from_line(line)
    assert caught.value.to_line() == f"ERR {caught.value.code} {caught.value}\n".encode()
    return caught.value.code.value, str(caught.value)


# -- what a hello may be


def test_the_shortest_hello_has_a_name_and_a_size() -> None:
    assert mps.Hello.from_line(b"MPS/1 a 1\n") == mps.Hello("a", 1)
    assert mps.Hello.from_line(b"MPS/1 press-7 65536\r\n") == mps.Hello("press-7", 65_536)


def test_options_come_in_any_order_and_leave_in_one() -> None:
    line = GOOD + b" new=1 first=4611686018427387904 epoch=00000000000000ff token=a=b~!\n"
    hello = mps.Hello.from_line(line.replace(b" 16 ", b" 1 "))
    assert hello == mps.Hello("press-7", 1, "a=b~!", 255, FIRST_MAX, True)
    assert hello.to_line() == b"MPS/1 press-7 1 token=a=b~! epoch=00000000000000ff first=4611686018427387904 new=1\n"


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        (b"GET / HTTP/1.1", "syntax", "a hello begins with MPS/1"),
        (b"", "syntax", "words are separated by one space"),
        (b"mps/1 a 1", "syntax", "a hello begins with MPS/1"),
        (b"MPS/2 a 1", "version", "this server speaks MPS/1"),
        (b"MPS/", "version", "this server speaks MPS/1"),
        (b"MPS/10 a 1", "version", "this server speaks MPS/1"),
        (b"MPS/2 a  16", "version", "this server speaks MPS/1"),
        (b"MPS/2 \xc3\xa4 16", "version", "this server speaks MPS/1"),
        (b"MPS/\xff", "version", "this server speaks MPS/1"),
        (b"MPS/2 ", "version", "this server speaks MPS/1"),
        (b"MPS/1", "syntax", "MPS/1 is followed by a client id and a packet size"),
        (b"MPS/1 a", "syntax", "MPS/1 is followed by a client id and a packet size"),
        (b"MPS/1  a 1", "syntax", "words are separated by one space"),
        (b" MPS/1 a 1", "syntax", "words are separated by one space"),
        (b"MPS/1 a 1 ", "syntax", "words are separated by one space"),
        (b"MPS/1\ta 1", "syntax", "a hello is printable ASCII"),
        (b"MPS/1 \xc3\xa4 1", "syntax", "a hello is printable ASCII"),
        (b"MPS/1 a 1\0", "syntax", "a hello is printable ASCII"),
        (b"MPS/1 a\r 1", "syntax", "a hello is printable ASCII"),
        (b"MPS/1 a 1\r\r", "syntax", "a hello is printable ASCII"),
        (b"MPS/1 a 1\nx", "syntax", "a hello is printable ASCII"),
        (b"MPS/1 .a 1", "client-id", "a client id is 1 to 64 letters"),
        (b"MPS/1 -a 1", "client-id", "a client id is 1 to 64 letters"),
        (b"MPS/1 a/b 1", "client-id", "a client id is 1 to 64 letters"),
        (b"MPS/1 a@b 1", "client-id", "a client id is 1 to 64 letters"),
        (b"MPS/1 " + b"a" * 65 + b" 1", "client-id", "a client id is 1 to 64 letters"),
        (b"MPS/1 a 0", "packet-size", "a packet has 1 to 65536 bytes"),
        (b"MPS/1 a 65537", "packet-size", "a packet has 1 to 65536 bytes"),
        (b"MPS/1 a 016", "packet-size", "a packet has 1 to 65536 bytes"),
        (b"MPS/1 a +16", "packet-size", "a packet has 1 to 65536 bytes"),
        (b"MPS/1 a -1", "packet-size", "a packet has 1 to 65536 bytes"),
        (b"MPS/1 a 1_6", "packet-size", "a packet has 1 to 65536 bytes"),
        (b"MPS/1 a 1e1", "packet-size", "a packet has 1 to 65536 bytes"),
        (b"MPS/1 a " + b"9" * 400, "packet-size", "a packet has 1 to 65536 bytes"),
        (GOOD + b" speed=9", "syntax", "unknown option; known are token, epoch, first, new"),
        (GOOD + b" new", "syntax", "unknown option; known are token, epoch, first, new"),
        (GOOD + b" =1", "syntax", "unknown option; known are token, epoch, first, new"),
        (GOOD + b" First=1", "syntax", "unknown option; known are token, epoch, first, new"),
        (GOOD + b" first=1 first=1", "syntax", "first= is there twice"),
        (GOOD + b" new=1 new=1", "syntax", "new= is there twice"),
        (GOOD + b" new=0", "syntax", "new=1 is the only value of new"),
        (GOOD + b" new=", "syntax", "new=1 is the only value of new"),
        (GOOD + b" new=true", "syntax", "new=1 is the only value of new"),
        (GOOD + b" epoch=0123456789abcde", "syntax", "an epoch is 16 digits 0-9a-f"),
        (GOOD + b" epoch=0123456789abcdef0", "syntax", "an epoch is 16 digits 0-9a-f"),
        (GOOD + b" epoch=0123456789ABCDEF", "syntax", "an epoch is 16 digits 0-9a-f"),
        (GOOD + b" epoch=", "syntax", "an epoch is 16 digits 0-9a-f"),
        (GOOD + b" first=-1", "first", "first is a number of at most 4611686018427387904"),
        (GOOD + b" first=01", "first", "first is a number of at most 4611686018427387904"),
        (GOOD + b" first=", "first", "first is a number of at most 4611686018427387904"),
        (GOOD + b" first=4611686018427387905", "first", "first is a number of at most 4611686018427387904"),
        (GOOD + b" first=288230376151711745", "first", "first times the packet size is at most 4611686018427387904"),
        (GOOD + b" token=", "token", "a token is 1 to 128 printable characters"),
        (GOOD + b" token=" + b"t" * 129, "token", "a token is 1 to 128 printable characters"),
    ],
)
def test_what_is_no_hello_is_refused_with_its_code(line: bytes, code: str, text: str) -> None:
    assert refusal(line + b"\n")[0] == code
    assert refusal(line + b"\n")[1].startswith(text)


def test_the_largest_offset_that_a_hello_may_name_is_taken() -> None:
    assert mps.Hello.from_line(GOOD + b" first=288230376151711744\n").first == FIRST_MAX // 16


def test_a_line_has_512_bytes_with_its_end() -> None:
    longest = b"MPS/1 a 1 " + b"x" * (512 - 11) + b"\n"
    assert len(longest) == 512
    assert refusal(longest)[0] == "syntax"
    assert refusal(b"M" + longest)[0] == "line-too-long"
    assert refusal(GOOD)[0] == "line-too-long"  # a caller who did not wait for the LF


def test_everything_that_a_hello_can_hold_fits_its_line() -> None:
    hello = mps.Hello("a" * 64, 65_536, "t" * 128, 2**64 - 1, FIRST_MAX // 65_536, True)
    assert len(hello.to_line()) < 300
    assert mps.Hello.from_line(hello.to_line()) == hello


def test_the_length_of_a_hello_is_known_as_soon_as_its_line_is_there() -> None:
    for end in range(len(GOOD)):
        assert mps.hello_length(GOOD[:end]) is None
    assert mps.hello_length(GOOD + b"\n") == len(GOOD) + 1
    assert mps.hello_length(GOOD + b"\r\n\n\npackets\n") == len(GOOD) + 2
    assert mps.hello_length(b"\n") == 1
    assert mps.hello_length(b"x" * 511) is None
    assert mps.hello_length(b"x" * 511 + b"\n") == 512
    for peeked in (b"x" * 512, b"x" * 512 + b"\n", bytes(100_000)):
        with pytest.raises(mps.HelloError, match="at most 512 bytes") as caught:
            mps.hello_length(peeked)
        assert caught.value.code is mps.ErrorCode.LINE_TOO_LONG


# -- what an answer may be


def read(received: bytes) -> list[mps.Answer]:
    return mps.AnswerReader().feed(received)


def test_answers_read_as_what_they_say() -> None:
    assert read(b"OK 7 durable 00000000000000ff\nACK 8\nACK 9\nBYE idle\n") == [
        mps.Ok(7, mps.Level.DURABLE, 255),
        mps.Ack(8),
        mps.Ack(9),
        mps.Bye("idle"),
    ]
    assert read(b"OK 0 stored ffffffffffffffff\r\n") == [mps.Ok(0, mps.Level.STORED, 2**64 - 1)]
    assert read(b"BYE superseded retry=30\n") == [mps.Bye("superseded", 30)]
    assert read(b"ERR busy 32 connections are open\n") == [mps.Refusal("busy", "32 connections are open")]
    assert read(b"ERR busy\n") == read(b"ERR busy \n") == [mps.Refusal("busy", "")]


def test_a_long_wait_is_cut_to_an_hour() -> None:
    assert (
        read(b"BYE stopping retry=3600\nBYE stopping retry=3601\nBYE stopping retry=9999999999999999999\n")
        == [mps.Bye("stopping", 3600)] * 3
    )


@pytest.mark.parametrize(
    "line",
    [
        b"HELLO", b"ok 1 durable 0000000000000000", b"OK", b"OK 1", b"OK 1 durable", b"OK 1 durable 0", b" ACK 1",
        b"OK 1 synced 0000000000000000", b"OK 01 durable 0000000000000000", b"OK 1 durable 000000000000000G",
        b"OK 1 durable 0000000000000000 more", b"OK  1 durable 0000000000000000", b"ACK -1", b"ACK 1 ", b"ACK 1 2",
        b"ACK 01", b"ACK x", b"ACK 10000000000000000000", b"ACK\t1", b"ACKN 1", b"BYE", b"BYE ", b"BYE Idle", b"BYE 1",
        b"BYE idle retry", b"BYE idle retry=", b"BYE idle retry=-1", b"BYE idle again=1", b"BYE idle retry=1 now",
        b"BYE " + b"x" * 33, b"ERR", b"ERR ", b"ERR Busy", b"ERR 42 no", b"\xff\xfe", b"\0", b"ERR busy" + b"x" * 504,
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error(line: bytes) -> None:
    with pytest.raises(mps.AnswerError):
        read(line + b"\n")
    with pytest.raises(mps.AnswerError):
        mps.parse_answer(line)


def test_an_answer_has_512_bytes_with_its_end() -> None:
    longest = b"ERR busy " + b"x" * 502 + b"\n"
    assert len(longest) == 512
    assert read(longest) == [mps.Refusal("busy", "x" * 502)]
    with pytest.raises(mps.AnswerError):
        read(longest[:-1] + b"x\n")
    reader = mps.AnswerReader()
    assert reader.feed(b"x" * 511) == []
    with pytest.raises(mps.AnswerError, match="more than 512"):
        reader.feed(b"x")


def test_what_stands_before_a_fault_is_not_lost_with_it() -> None:
    reader = mps.AnswerReader()
    assert reader.feed(b"ERR busy later\n\x00\x01") == [mps.Refusal("busy", "later")]
    reader = mps.AnswerReader()
    assert reader.feed(b"ACK 1\nrubbish\nACK 2\n") == [mps.Ack(1)]
    for _ in range(2):
        with pytest.raises(mps.AnswerError, match="rubbish"):
            reader.feed(b"ACK 3\n")


def test_a_torn_acknowledgement_is_smaller_or_nothing() -> None:
    whole = b"ACK 10450\n"
    for end in range(len(whole)):
        answers = read(whole[:end] + b"\n" + b"ACK 10451\n")
        assert answers[-1] == mps.Ack(10_451)
        assert all(isinstance(answer, mps.Ack) and answer.next_packet <= 10_450 for answer in answers[:-1])


def test_empty_lines_say_nothing() -> None:
    assert read(b"\n\r\n\nACK 1\n\n") == [mps.Ack(1)]
    assert mps.parse_answer(b"") is mps.parse_answer(b"\n") is mps.parse_answer(b"\r\n") is None


def test_a_refusal_is_cut_to_its_line_and_stays_printable() -> None:
    line = mps.Refusal("busy", "b\xe4\r\nACK 9\n" + "x" * 600).to_line()
    assert len(line) == 512
    assert line.startswith(b"ERR busy b???ACK 9?xxx")
    assert line.count(b"\n") == 1


def test_what_passes_by_itself_is_told_from_what_does_not() -> None:
    passing = {code.value for code in mps.ErrorCode if not code.is_final}
    assert passing == {"timeout", "in-use", "busy", "unavailable", "quarantined"}
    for code in mps.ErrorCode:
        assert mps.Refusal(code.value, "").is_final is code.is_final
    assert mps.Refusal("never-heard-of", "").is_final


def test_codes_and_reasons_are_words_that_a_client_takes() -> None:
    for word in (*mps.ErrorCode, *mps.ByeReason):
        assert re.fullmatch(r"[a-z][a-z-]{0,31}", word.value), word


# -- round trips

CLIENT_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
WORDS = st.from_regex(r"[a-z][a-z-]{0,31}", fullmatch=True)
INDICES = st.integers(0, FIRST_MAX)


@given(
    CLIENT_IDS,
    st.integers(1, 65_536),
    st.none() | st.from_regex(r"[!-~]{1,128}", fullmatch=True),
    st.none() | st.integers(0, 2**64 - 1),
    st.none() | INDICES,
    st.booleans(),
)
def test_every_hello_survives_its_line(
    client_id: str, size: int, token: str | None, epoch: int | None, first: int | None, new: bool
) -> None:
    hello = mps.Hello(client_id, size, token, epoch, None if first is None else first // size, new)
    line = hello.to_line()
    assert HELLO.fullmatch(line)
    assert mps.hello_length(line + b"packets\n") == len(line)
    assert mps.Hello.from_line(line) == hello == mps.Hello.from_line(line[:-1] + b"\r\n")


ANSWERS = st.one_of(
    st.builds(mps.Ok, INDICES, st.sampled_from(list(mps.Level)), st.integers(0, 2**64 - 1)),
    st.builds(mps.Ack, INDICES),
    st.builds(mps.Bye, WORDS, st.none() | st.integers(0, mps.RETRY_S_MAX)),
    st.builds(mps.Refusal, WORDS, st.from_regex(r"[ -~]{0,400}", fullmatch=True)),
)


@given(st.lists(ANSWERS, max_size=20), st.data())
def test_every_answer_survives_its_line_however_the_lines_are_cut(
    answers: list[mps.Answer], data: st.DataObject
) -> None:
    sent = b"".join(answer.to_line() for answer in answers)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=30)))
    reader = mps.AnswerReader()
    received = [reader.feed(sent[a:b]) for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    assert [answer for some in received for answer in some] == answers


# -- random input: only HelloError and AnswerError come out, and only where the grammar says no


def is_hello(line: bytes) -> bool:
    """By the grammar and the limits of docs/protocol.md."""
    found = HELLO.fullmatch(line)
    if found is None or len(line) > 512 or int(found["size"]) > 65_536:
        return False
    options = dict(word.split(b"=", 1) for word in found["options"].split())
    if len(options) != len(found["options"].split()):
        return False
    return int(options.get(b"first", b"0")) * int(found["size"]) <= FIRST_MAX >= int(options.get(b"first", b"0"))


def expected_answers(received: bytes) -> tuple[list[mps.Answer], bool]:
    """By the grammar: the answers before the first fault, and whether there is one."""
    *lines, rest = received.split(b"\n")
    answers: list[mps.Answer] = []
    for line in lines:
        if line in TORN:
            continue
        found = ANSWER.fullmatch(line)
        if found is None or len(line) >= 512:
            return answers, True
        answers.append(built(found))
    return answers, len(rest) >= 512


def built(found: re.Match[bytes]) -> mps.Answer:
    if found["ok"] is not None:
        return mps.Ok(int(found["ok"]), mps.Level(found["level"].decode()), int(found["epoch"], 16))
    if found["ack"] is not None:
        return mps.Ack(int(found["ack"]))
    if found["bye"] is not None:
        return mps.Bye(found["bye"].decode(), None if found["retry"] is None else min(int(found["retry"]), 3600))
    return mps.Refusal(found["code"].decode(), (found["text"] or b"").decode("ascii", "replace"))


HELLO_PIECES = (
    b"MPS/1", b"MPS/2", b"MPS/", b"a", b"press-7", b"a" * 64, b"a" * 65, b".", b"1", b"16", b"0", b"65536", b"65537",
    b"token=", b"token=t", b"epoch=0123456789abcdef", b"epoch=x", b"first=0", b"first=17", b"first=4611686018427387904",
    b"first=9999999999999999999", b"new=1", b"new=", b"=", b" ", b" ", b"\r", b"\n", b"\0", b"\xff", b"x" * 500,
)  # fmt: skip
ANSWER_PIECES = (
    b"OK 1 durable 0123456789abcdef\n", b"OK 1 stored ffffffffffffffff\r\n", b"ACK 7\n", b"ACK 12", b"ACK ", b"AC",
    b"BYE idle\n", b"BYE superseded retry=30\n", b"BYE stopping retry=99999\n", b"ERR busy later\n", b"ERR x\n",
    b"\n", b"\r\n", b"OK 1 dur", b"BYE", b"ERR ", b" ", b"0", b"9999999999999999999", b"\xff", b"\0", b"x" * 300,
    b"ACK 4\nACK 5\n",
)  # fmt: skip


def hello_like(rng: random.Random) -> Iterator[bytes]:
    """Rubbish, heaps of words, and good lines with up to two bytes changed, by thirds."""
    while True:
        yield rng.randbytes(rng.randrange(40))
        yield b" ".join(rng.choices(HELLO_PIECES, k=rng.randrange(1, 8))) + b"\n"
        options = rng.sample(HELLO_PIECES[14:23], rng.randrange(4))
        good = bytearray(b" ".join((b"MPS/1", HELLO_PIECES[rng.randrange(3, 6)], b"16", *options)) + b"\n")
        for _ in range(rng.randrange(3)):
            good[rng.randrange(len(good))] = rng.choice(b"\n\r =0123456789abcdefMPS/\x7f\x80")
        yield bytes(good)


def random_seed(part: str) -> random.Random:
    print(f"MPSERVERD_TEST_SEED={SEED}", file=sys.stderr)
    return random.Random(f"{SEED} {part}")


def test_random_hellos_are_taken_or_refused_as_the_grammar_says() -> None:
    taken = 0
    rng = random_seed("hello")
    lines = hello_like(rng)
    for _ in range(FUZZ_INPUTS * 4 // 10):
        line = next(lines)
        try:
            hello = mps.Hello.from_line(line)
        except mps.HelloError as fault:
            assert not is_hello(line), line
            assert len(fault.to_line()) <= 512
            continue
        assert is_hello(line), line
        assert sorted(hello.to_line().split()) == sorted(line.split()), line
        taken += 1
    assert taken > FUZZ_INPUTS // 100, "the random lines are too bad to test what is good"


def test_random_bytes_have_the_length_of_their_first_line() -> None:
    rng = random_seed("length")
    pool = rng.randbytes(1 << 20)
    for _ in range(FUZZ_INPUTS * 3 // 10):
        at, size = rng.randrange(1 << 20), rng.choice((3, 40, 511, 512, 513, 700))
        peeked = pool[at : at + size]
        end = peeked.find(b"\n") + 1
        try:
            length = mps.hello_length(peeked)
        except mps.HelloError as fault:
            assert fault.code == "line-too-long"
            assert b"\n" not in peeked[:512] and len(peeked) >= 512
        else:
            assert length == (end or None)
            assert end <= 512 and (end or len(peeked) < 512)


def fed_in_pieces(rng: random.Random, sent: bytes) -> tuple[list[mps.Answer], bool]:
    """The answers, and whether a fault came out, with what the reader holds looked at after every piece."""
    reader, answers, at = mps.AnswerReader(), [], 0
    try:
        while at < len(sent):
            size = rng.choice((1, 2, 7, 50, 1000))
            answers += reader.feed(sent[at : at + size])
            at += size
            held = sum(len(value) for value in vars(reader).values() if isinstance(value, bytes))
            assert held < 512, f"{held} bytes are held"
        reader.feed(b"")
    except mps.AnswerError:
        return answers, True
    return answers, False


def test_random_answers_are_read_as_the_grammar_says_however_they_are_cut() -> None:
    rng = random_seed("answers")
    count = good = 0
    while count < FUZZ_INPUTS * 3 // 10:
        pieces = rng.choices(ANSWER_PIECES, k=rng.randrange(1, 7))
        if rng.random() < 0.2:
            pieces.append(rng.randbytes(20))
        sent = b"".join(pieces)
        expected = expected_answers(sent)
        assert fed_in_pieces(rng, sent) == expected, sent
        assert fed_in_pieces(rng, sent) == expected, sent
        count += 2
        good += len(expected[0])
    assert good > count // 4, "the random answers are too bad to test what is good"


# -- the manual says the same


def rows_of_the_manual(heading: str) -> dict[str, list[str]]:
    """Tables below a heading of docs/protocol.md: the first cell's word and the other cells."""
    text = (pathlib.Path(__file__).resolve().parents[3] / "docs" / "protocol.md").read_text()
    section = re.split(r"^##+ ", text.split(f"\n### {heading}\n")[1], flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|(.*)\|$", section, re.MULTILINE)
    return {word: [cell.strip() for cell in cells.split("|")] for word, cells in rows}


def test_the_manual_has_every_code_and_whether_it_is_final() -> None:
    listed = {word: cells[0] for word, cells in rows_of_the_manual("Refusal: ERR").items()}
    assert listed == {code.value: "yes" if code.is_final else "no" for code in mps.ErrorCode}


def test_the_manual_has_every_reason_and_level() -> None:
    assert list(rows_of_the_manual("The end: BYE")) == [reason.value for reason in mps.ByeReason]
    assert list(rows_of_the_manual("OK, packets, ACK")) == [level.value for level in mps.Level]

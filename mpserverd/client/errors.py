"""What a program that uses a client has to reckon with.

ClientError (MpserverdError)
  PacketLengthError    also a ValueError: bytes that are no whole packets; ``taken`` packets of the call were taken
  BufferFullError      no room in time, or at all; ``taken`` packets of the call were taken
  NotAcknowledgedError also a TimeoutError: flush or close ran out of time; ``held`` packets are not acknowledged
  FinalError           the client has given up and will not connect again; what it held it still holds
    RefusedError       the server said ERR with a code that trying again cannot help
    EpochError         the server has another stream than the one that this client goes on with
    StreamLostError    the server lacks packets that it had acknowledged
    StreamTakenError   the server has packets that this client never sent: two clients use one id
  BufferFileError      a buffer file that is in use, damaged, not ours, or cannot be written
  ClientClosedError    the client was closed
"""

from __future__ import annotations

from mpserverd.errors import MpserverdError


class ClientError(MpserverdError):
    pass


class PacketLengthError(ClientError, ValueError):
    def __init__(self, text: str, taken: int = 0) -> None:
        super().__init__(text)
        self.taken = taken


class BufferFullError(ClientError):
    def __init__(self, text: str, taken: int = 0) -> None:
        super().__init__(text)
        self.taken = taken


class NotAcknowledgedError(ClientError, TimeoutError):
    def __init__(self, text: str, held: int) -> None:
        super().__init__(text)
        self.held = held


class FinalError(ClientError):
    pass


class RefusedError(FinalError):
    """``code`` is the word after ERR."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"the server refused this client: {code}: {text}")
        self.code = code


class EpochError(FinalError):
    pass


class StreamLostError(EpochError):
    pass


class StreamTakenError(FinalError):
    pass


class BufferFileError(ClientError):
    pass


class ClientClosedError(ClientError):
    pass

"""``AsyncStreamClient``: the same as ``StreamClient`` for programs that run on asyncio. No thread.

    async with AsyncStreamClient("host:8889", "press-7", packet_size=16) as client:
        await client.send(b"0123456789abcdef" * 804)
        await client.flush()

Rules: make it and use it within one running event loop. Callbacks are plain functions and run in the loop. A program
that keeps the loop busy keeps the client from receiving. With ``buffer_file`` each ``send`` writes to the file within
the loop (memory of the system, microseconds), and what waits for the disk is done in a thread of the loop's pool. Two
exceptions: the constructor reads the whole file, and with ``buffer_sync`` a full ring that goes around may sync once.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

from mpserverd.client import intake
from mpserverd.client.core import ClientCore
from mpserverd.client.errors import BufferFullError, ClientClosedError, ClientError, PacketLengthError
from mpserverd.client.io_loop import SEND_BYTES_MAX, SEND_NOW_BYTES, call
from mpserverd.client.session import CONNECTED_STATES, Loss, State

if TYPE_CHECKING:
    from mpserverd.client.intake import Packets

RECEIVE_BYTES = 65_536


class AsyncStreamClient(ClientCore):
    """Connects at once, in a task; the constructor does not wait for it. docs/clients.md has every argument."""

    def _prepare(self) -> None:
        self._loop = asyncio.get_running_loop()

    def _begin(self) -> None:
        self._one_call = asyncio.Lock()
        self._work = asyncio.Event()
        self._changed = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._is_hurried = False
        self._task = self._loop.create_task(self._run(), name=f"stream-client-{self._session.terms.client_id}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            await self.close()
        else:
            with contextlib.suppress(ClientError):
                await self.close(timeout_s=0.0)

    # -- sending

    async def send(self, packets: Packets, timeout_s: float | None = None) -> int:
        """Take packets, and return how many. Waits for room up to ``timeout_s`` if ``on_full`` is "block".

        Raises as ``StreamClient.send`` does. If it is cancelled, some of the packets may have been taken.
        """
        deadline = self._loop.time() + (self._send_timeout_s if timeout_s is None else timeout_s)
        taken = 0
        try:
            async with asyncio.timeout_at(deadline):
                await self._one_call.acquire()
        except TimeoutError:
            raise self._full(1) from None
        try:
            for block in intake.blocks(packets, self._packet_size):
                for piece in self._pieces(block):
                    taken += await self._keep(piece, deadline)
            if self._is_synced and taken:
                await asyncio.to_thread(self._buffer.sync)
        except (PacketLengthError, BufferFullError) as error:
            error.taken = taken
            raise
        finally:
            self._one_call.release()
        return taken

    async def _keep(self, piece: memoryview, deadline: float) -> int:
        count = len(piece) // self._packet_size
        self._check_alive()
        while not self._place_for(count, self._loop.time()):
            if self._on_full == "raise" or not await self._has_changed(deadline):
                raise self._full(count)
            self._check_alive()
        if self._session.state is State.WAITING and self._writer is not None:
            self._writer.transport.abort()  # packets were dropped that the connection had before it
        self._buffer.append(piece)
        self._work.set()
        if len(piece) >= SEND_NOW_BYTES:
            await asyncio.sleep(0)  # others want to run too
        return count

    async def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until everything sent so far is acknowledged. Raises NotAcknowledgedError, or what ended the client."""
        deadline = self._loop.time() + timeout_s
        self._check_alive()
        end = self._buffer.end_place
        self._is_hurried = True
        self._work.set()
        while self._buffer.base_place < end:
            if not await self._has_changed(deadline):
                raise self._unacknowledged(timeout_s)
            self._check_alive()

    async def close(self, timeout_s: float = 30.0) -> int:
        """Flush, and end. Returns the number of packets that a buffer file keeps for the next start; without a file
        raises NotAcknowledgedError if packets were left. May be called again."""
        if self._session.state is State.CLOSED:
            await self._end()
            return self._buffer.held
        error: ClientError | None = None
        try:
            await self.flush(timeout_s)
        except ClientError as caught:
            error = caught
        finally:
            self._session.close()
            self._tell()
            await self._end()
        if error is not None and not self._is_kept:
            raise self._unacknowledged(timeout_s) from error
        return self._buffer.held

    async def _end(self) -> None:
        """The task, the connection, the file. If it is cancelled, another ``close`` goes on with it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        async with self._one_call:
            if not self._buffer.is_closed:
                await asyncio.to_thread(self._buffer.close)

    def _check_alive(self) -> None:
        super()._check_alive()
        if self._task.done():
            fault = None if self._task.cancelled() else self._task.exception()
            raise ClientClosedError("the client's task has ended") from fault

    # -- waiting for one another

    async def _has_changed(self, deadline: float) -> bool:
        """Wait for the next change of anything; False when the time is over."""
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(self._changed)
        except TimeoutError:
            return False
        return True

    def _tell(self) -> None:
        """Callbacks, and whoever waits for a change."""
        notices = self._session.take_notices()
        if notices:
            self._changed.set_result(None)
            self._changed = self._loop.create_future()
            self._work.set()
        for notice in notices:
            call(self._on_ack, self._on_state, notice)

    # -- the task

    async def _run(self) -> None:
        try:
            while self._session.state is State.WAITING:
                at = self._session.dial_at
                self._work.clear()
                if at is None:
                    await self._work.wait()
                elif at > self._loop.time():
                    await asyncio.sleep(at - self._loop.time())
                else:
                    await self._live_once(*self._session.dial(self._loop.time()))
        finally:
            self._end_connection()

    async def _live_once(self, host: str, port: int) -> None:
        """One attempt, and the connection that comes of it."""
        session, loop = self._session, self._loop
        self._tell()
        try:
            async with asyncio.timeout(session.terms.connect_timeout_s):
                name = host if self._tls is not None else None
                reader, self._writer = await asyncio.open_connection(
                    host, port, limit=RECEIVE_BYTES, ssl=self._tls, server_hostname=name
                )
        except TimeoutError:
            session.lost(Loss.CONNECT_TIMEOUT, f"no connection in {session.terms.connect_timeout_s:g} s", loop.time())
        except (OSError, UnicodeError) as error:
            session.lost(Loss.UNREACHABLE, f"{host}: {error}", loop.time())
        else:
            await self._stream(reader, self._writer)
        self._end_connection()
        self._tell()

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the session says that this connection is over."""
        writer.transport.set_write_buffer_limits(high=SEND_BYTES_MAX)
        writer.write(self._session.connected(self._loop.time()))
        self._tell()
        sender = self._loop.create_task(self._send_out(writer))
        try:
            while self._session.state in CONNECTED_STATES:
                self._arm(writer)
                try:
                    received = await reader.read(RECEIVE_BYTES)
                except OSError as error:
                    self._lose(Loss.BROKEN, str(error))
                    break
                if self._session.state in CONNECTED_STATES:
                    self._session.receive(received, self._loop.time())
                self._tell()
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_out(self, writer: asyncio.StreamWriter) -> None:
        session = self._session
        while session.state in CONNECTED_STATES:
            if not session.buffer.is_settled:
                await asyncio.to_thread(session.buffer.settle)
            waiting_bytes = session.outgoing_bytes
            if not waiting_bytes:
                self._work.clear()
                self._is_hurried = False
                await self._work.wait()
                continue
            if waiting_bytes < SEND_NOW_BYTES and not self._is_hurried:
                await asyncio.sleep(self._linger_s)
            piece = bytes(session.outgoing(SEND_BYTES_MAX))  # the transport may keep it longer than the buffer does
            writer.write(piece)
            session.sent(len(piece), self._loop.time())
            self._arm(writer)
            with contextlib.suppress(OSError):  # the reader is told too, after what had come in before
                await writer.drain()
            if writer.is_closing():
                return

    def _lose(self, loss: Loss, detail: str) -> None:
        if self._session.state in CONNECTED_STATES:
            self._session.lost(loss, detail, self._loop.time())

    def _arm(self, writer: asyncio.StreamWriter) -> None:
        """Look at the session's deadline when it is over; the timer that is set may be an earlier one."""
        deadline = self._session.deadline
        if deadline is None or (self._timer is not None and self._timer.when() <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._expire, writer)

    def _expire(self, writer: asyncio.StreamWriter) -> None:
        self._timer = None
        self._session.expire(self._loop.time())
        if self._session.state in CONNECTED_STATES:
            self._arm(writer)
        else:
            writer.transport.abort()  # wakes the reader
            self._tell()

    def _end_connection(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._writer is not None:
            self._writer.transport.abort()  # what is not acknowledged is sent again; what is needs no farewell
        self._timer = self._writer = None

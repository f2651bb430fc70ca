"""Flow control (2.6.8): windows for each stream and, since SPDY/3.1, for the session as stream 0.

The Go library that Kubernetes' clients are built on (moby/spdystream) knows WINDOW_UPDATE but neither sends it
nor waits for it. So our sending keeps to the windows only once the peer has shown that it uses them, by
WINDOW_UPDATE or SETTINGS; what was sent before counts then. The other way round we open windows as data is
consumed, whoever the peer is, and do not reset streams of peers that send more: what bounds them is that we
stop reading.
"""

from __future__ import annotations

from crishim.streaming.spdy.frames import INITIAL_WINDOW, MAX_LENGTH, MAX_WINDOW


class WindowError(Exception):
    """A window was opened wider than 2^31-1 bytes, or by nothing."""


class SendWindows:
    """How much may be sent. ``active`` once the peer has shown that it minds."""

    def __init__(self) -> None:
        self.active = False
        self._initial = INITIAL_WINDOW
        self._left: dict[int, int] = {0: INITIAL_WINDOW}

    def add(self, stream_id: int) -> None:
        """A new stream."""
        self._left[stream_id] = self._initial

    def drop(self, stream_id: int) -> None:
        """A stream is closed."""
        self._left.pop(stream_id, None)

    def allowance(self, stream_id: int) -> int:
        """Bytes that may be sent on a stream now, at most what a frame holds."""
        if not self.active:
            return MAX_LENGTH
        return max(0, min(self._left.get(stream_id, 0), self._left[0], MAX_LENGTH))

    def sent(self, stream_id: int, count: int) -> None:
        """Count what was sent."""
        self._left[stream_id] -= count
        self._left[0] -= count

    def open(self, stream_id: int, delta: int) -> bool:
        """The peer opened a window; False if the stream is not there any more."""
        self.active = True
        if stream_id not in self._left:
            return False
        if not 0 < delta <= MAX_WINDOW or self._left[stream_id] + delta > MAX_WINDOW:
            raise WindowError(f"window of stream {stream_id} opened by {delta}")
        self._left[stream_id] += delta
        return True

    def set_initial(self, size: int) -> None:
        """The peer changed the windows of all streams, the session's not (3.1)."""
        if size > MAX_WINDOW:
            raise WindowError(f"initial window of {size}")
        self.active = True
        for stream_id in self._left:
            if stream_id:
                self._left[stream_id] += size - self._initial
        self._initial = size


class ReceiveWindow:
    """How much we have consumed without having told it: told in steps of half the window."""

    def __init__(self, size: int) -> None:
        self._step = max(1, size // 2)
        self._untold = 0

    def consumed(self, count: int) -> int:
        """Count consumed bytes; the delta to tell the peer, or 0."""
        self._untold += count
        if self._untold < self._step:
            return 0
        delta, self._untold = self._untold, 0
        return delta

"""Terminal sizes as clients send them: JSON objects ``{"Width": 80, "Height": 24}``, one after the other."""

from __future__ import annotations

import json

from crishim.containers.client import Size, Sizes

MAX_WAITING = 4096
"""Most characters of one object."""


class SizeDecoder:
    """Takes the resize stream; the sizes go to ``sizes``. What is no size ends it: the terminal keeps its last one."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._text = ""
        self._broken = False
        self._json = json.JSONDecoder()

    def data(self, chunk: memoryview) -> None:
        """Some bytes of the stream."""
        if self._broken:
            return
        self._text += bytes(chunk).decode("ascii", errors="replace")
        size = None
        while self._text and not self._broken:
            self._text = self._text.lstrip()
            try:
                value, at = self._json.raw_decode(self._text)
            except (ValueError, RecursionError):  # not whole, or no JSON
                self._broken = len(self._text) > MAX_WAITING
                break
            self._text = self._text[at:]
            size = self._size(value)
        if size is not None:
            self._sizes.push(size)

    def _size(self, value: object) -> Size | None:
        if isinstance(value, dict):
            width, height = value.get("Width"), value.get("Height")
            if isinstance(width, int) and isinstance(height, int) and 0 < width < 1 << 16 and 0 < height < 1 << 16:
                return Size(width, height)
        self._broken = not isinstance(value, dict)
        return None

    def end(self) -> None:
        """The stream has ended."""

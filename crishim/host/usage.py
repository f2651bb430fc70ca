"""How much a directory tree takes on disk."""

from __future__ import annotations

import os
from pathlib import Path


def disk_usage(root: Path) -> tuple[int, int]:
    """Bytes allocated and inodes at and below ``root``; hard links count once. Walks: for background use."""
    seen = set[tuple[int, int]]()
    used = inodes = 0
    waiting = [os.fspath(root)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                found = list(entries)
        except OSError:
            continue
        for entry in found:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            used += status.st_blocks * 512
            inodes += 1
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
    return used, inodes

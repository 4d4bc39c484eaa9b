"""Files that stay open between reads, only so many of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

File = TypeVar("File")


class OpenFiles(Generic[File]):
    """File number -> the open file, the last used ones only; threads may share it.

    A file that is put out closes when its last reader is done, so its class has to close itself when it goes.
    """

    def __init__(self, open_file: Callable[[int], File], limit: int) -> None:
        self._open_file = open_file
        self._limit = limit
        self._files: OrderedDict[int, File] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, number: int) -> File:
        with self._lock:
            file = self._files.get(number)
            if file is None:
                file = self._files[number] = self._open_file(number)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(number)
            return file

"""One run a folder: a second one that would write into the same output is refused while the first lives.

In: the output folder.  Out: a lock that the system itself lets go when its process ends, however it ends.
"""

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from tessella.errors import TrainingError
from tessella.files import cannot_write

LOCK = "run.lock"


class Lock:
    """`with Lock(output):`. Raises TrainingError naming the process that writes there, WriteError when there is no writing."""

    def __init__(self, output: Path):
        self.path = output / LOCK
        try:
            output.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileExistsError as error:
            raise TrainingError(f"{output} is a file; a run needs a folder: give another output") from error
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self.handle, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(self.handle)
            raise TrainingError(
                f"{output} is being written by {holder}; stop that run or let it end, or give another --output"
            ) from error

    def __enter__(self) -> "Lock":
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.ftruncate(self.handle, 0)
        os.close(self.handle)

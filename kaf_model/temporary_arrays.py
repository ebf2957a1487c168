"""Arrays in temporary files, for what would take too much memory."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from kaf_model.errors import UserError


def zeros_on_disk(shape: tuple[int, ...], what: str) -> NDArray[np.float16]:
    """Zeros in a temporary file that goes with the array.

    The disk space is taken at once: where a mapped file turns out not to fit, the system kills the process.

    Args:
        shape: Of the array.
        what: Names the folder and the message, in the plural.

    Raises:
        UserError: If the disk has no room for it.
    """
    size = np.dtype(np.float16).itemsize * int(np.prod(shape))
    try:
        with ExitStack() as cleanup:
            folder = tempfile.TemporaryDirectory(prefix=f"kaf-{what}-", ignore_cleanup_errors=True)
            path = Path(cleanup.enter_context(folder)) / "array"
            with open(path, "xb") as file:
                _allocate(file, size)
            array = np.memmap(path, np.float16, mode="r+", shape=shape)
            weakref.finalize(array, cleanup.pop_all().close)
            return array
    except OSError as error:
        raise UserError(
            f"{what} need {size / 2**30:.2g} GiB in the temporary folder ({error.strerror}); free some space, "
            "or set TMPDIR to a folder on a larger disk"
        ) from error


def _allocate(file: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    if shutil.disk_usage(file.name).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file.truncate(size)

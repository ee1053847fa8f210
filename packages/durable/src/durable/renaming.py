"""The two renames that Python lacks: swap two names at once, and rename without overwriting.

Where the system or the filesystem has no renameat2 (macOS, some network filesystems), `exchange` says so
and `rename_new` looks before it renames.
"""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_NOT_AVAILABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


def exchange(first: Path, second: Path) -> bool:
    """Swap what two existing names stand for, in one step that no crash can split; False: cannot be done."""
    return _renameat2(first, second, _RENAME_EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename, or raise FileExistsError when `target` exists."""
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(source), os.fsencode(target)
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flags) == 0:
        return True
    reason = ctypes.get_errno()
    if reason in _NOT_AVAILABLE:
        return False
    raise OSError(reason, os.strerror(reason), str(source), None, str(target))

"""What to do about an error of the operating system, in words for the journal.

Pure but for the name of the user. It decides nothing: whoever caught the error does.
"""

from __future__ import annotations

import errno
import os
import pwd

_DENIED = frozenset({errno.EACCES, errno.EPERM})
_TODO = {
    errno.ENOTDIR: "something else is in the place of a directory; move it away",
    errno.EISDIR: "a directory is in the place of a file; move it away",
    errno.EROFS: "the file system is mounted read-only; look into the kernel's log, check and remount it",
    errno.EIO: "the disk fails; look into the kernel's log",
    errno.EMFILE: "too many open files; raise the limit of open files of the service",
    errno.ENFILE: "too many open files in the system; raise fs.file-max",
}


def advice(error: OSError) -> str:
    """The path, what is wrong with it, and the next step where one is known."""
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    text = f"{path}: {error.strerror or error}" if path else str(error.strerror or error)
    if error.errno in _DENIED:
        place = path or "the spool"
        return f"{text}; give it to the user of the service: chown -R {_user()}: {place}; chmod -R u+rwX {place}"
    todo = _TODO.get(error.errno or 0)
    return f"{text}; {todo}" if todo else text


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # an account that only the container's starter knows
        return str(os.geteuid())

"""The error tree's words for what the system refuses: memory, room on a disk, threads. None of it is a bug of ours."""

from __future__ import annotations

import errno

from llmx.errors import IntegrityError, LlmxError, ResourceError

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full for this user (quota)",
    errno.EFBIG: "the system lets no file grow this large",
}
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# How the libraries below say that there is no memory, where they raise no MemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "can't start new thread", "out of memory", "failed to map segment")
MEMORY_FIX = "give it more memory, --max-memory with what there is, --threads 1, or export with --no-validate"


def translated(error: BaseException) -> LlmxError | None:
    """What a user is told of an error that a system call or a library raised; None for one that is not such."""
    if isinstance(error, MemoryError):
        return ResourceError("there is not enough memory", fix=MEMORY_FIX)
    if isinstance(error, (RuntimeError, ImportError)) and any(sign in str(error) for sign in OUT_OF_MEMORY):
        return ResourceError("there is not enough memory, or there are too many threads", fix=MEMORY_FIX)
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        return disk_error(error, error.filename)
    return None


def disk_error(error: OSError, where: object) -> ResourceError | IntegrityError:
    """For a read or a write that failed."""
    if error.errno == errno.ENOMEM:
        return ResourceError("there is not enough memory", where=where, fix=MEMORY_FIX)
    if error.errno in NO_ROOM:
        return ResourceError(NO_ROOM[error.errno], where=where, fix="free some room, or choose another -o")
    if error.errno in READ_ONLY:
        return ResourceError(f"writing is not allowed: {error.strerror}", where=where, fix="choose another -o")
    return IntegrityError(f"reading or writing failed: {error.strerror or error}", where=where)

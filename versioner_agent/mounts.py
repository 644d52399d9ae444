"""Which file system a path lies on, by the kernel's table of mounts (proc_pid_mountinfo(5)). Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

#: Locks and syncs of these are not what SQLite needs (https://sqlite.org/howtocorrupt.html, section 2.1).
NETWORK = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "davfs2", "fuse.blobfuse2", "fuse.ceph", "fuse.ceph-fuse",
    "fuse.davfs2", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs", "fuse.moosefs", "fuse.mount-s3", "fuse.rclone",
    "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs",
    "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs",
})  # fmt: skip
IN_MEMORY = frozenset({"ramfs", "tmpfs"})
OVERLAY = frozenset({"aufs", "fuse.fuse-overlayfs", "overlay"})


class Mount(NamedTuple):
    """A mounted file system."""

    point: str
    kind: str
    source: str
    is_read_only: bool  # as a whole: one of its mounts alone may be, in the namespace of a service


def mount_of(table: str, path: str) -> Mount | None:
    """Return what is mounted at *path* (absolute, without links) or nearest above; None where *table* does not tell.

    Of several mounts at one point the last is on top.
    """
    found: Mount | None = None
    for line in table.splitlines():
        mount = _mount(line)
        if mount is None or not f"{path}/".startswith(f"{mount.point.rstrip('/')}/"):
            continue
        if found is None or len(mount.point) >= len(found.point):
            found = mount
    return found


def _mount(line: str) -> Mount | None:
    before, separator, behind = line.partition(" - ")
    left, right = before.split(" "), behind.split(" ")
    if not separator or len(left) < 5 or len(right) < 2:
        return None
    options = right[2].split(",") if len(right) > 2 else []
    is_read_only = "ro" in options or "emergency_ro" in options  # the latter is ext4's, after an error
    return Mount(_unescaped(left[4]), _unescaped(right[0]), _unescaped(right[1]), is_read_only)


def _unescaped(word: str) -> str:
    """Read octal escapes: a space is written as three digits behind a backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)

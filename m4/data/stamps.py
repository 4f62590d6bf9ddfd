"""Whether files are still what they were, without reading them."""

from __future__ import annotations

import hashlib
import os
import time

# Linux stamps files with the clock of the last timer tick, up to 10 ms ago. A file changed twice within one tick looks
# unchanged between the two.
TICK_NS = 50_000_000


class FileStamp:
    """A digest of the status of files, to be compared with that of another time.

    Size and time of modification alone are fooled: archives and copies set them. The time of the last status change
    (ctime) is the kernel's own, which no program that unpacks, copies, links or renames can set; the inode tells files
    of one ctime apart when they change places. Both differ in a copy of the data, and where inode numbers do not last:
    the price is a needless rebuild, the safe side. It costs one stat a file, as before; digests of the content of
    40,000 samples of five small files would cost as much as building the cache anew.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._newest_ns = 0

    def add(self, name: str, status: os.stat_result) -> None:
        """Count in one file, by a name that tells it from the others."""
        facts = f":{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino};"
        self._digest.update(os.fsencode(name) + facts.encode())
        self._newest_ns = max(self._newest_ns, status.st_ctime_ns)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def settle(self) -> None:
        """Wait (50 ms at most) until a further change must show in the ctime; files read from now on have this stamp
        for as long as they are what was read."""
        age = time.time_ns() - self._newest_ns
        if 0 <= age < TICK_NS:
            time.sleep((TICK_NS - age) / 1e9)

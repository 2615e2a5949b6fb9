"""Trees of CUDA tensors that wait in the host's memory: copied there and back by a stream of their own, beside what the device computes.

Only page-locked memory is copied so. Locking costs as much as a copy of some hundred megabytes does a thousand times, and torch's own
rounds up to a power of two; so memory is locked here, exactly as much as is asked for, by threads that are ahead of the copies, and is
used again. What the host has no room for becomes a file that is mapped, without a name, in the folder for temporary files.
"""

import functools
import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

LINE = 256  # bytes that every array begins at a multiple of
AHEAD = 6  # pieces of memory that threads lock before they are wanted
SPARE = 1 << 32  # bytes of the host's memory that stay for others


class Parked:
    """A tree, away from the device as soon as the device gets to it. tree_map: as in ops; more: so many trees like it will follow.

    Arrays that are alike travel as one, so that the host has little to ask for.
    """

    def __init__(self, tree_map, tree, device, more=0):
        alike = {}

        def put(x):
            group = alike.setdefault((x.dtype, tuple(x.shape)), [])
            group.append(x)
            return Place((x.dtype, tuple(x.shape)), len(group) - 1)

        self.map, self.tree, self.device = tree_map, tree_map(put, tree), device
        packed = {key: torch.stack(group) for key, group in alike.items()}
        self.piece, self.away, self.there, at = piece(sum(room(x) for x in packed.values()), more), {}, None, 0
        lane(device).wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(lane(device)):
            for key, x in packed.items():
                to = self.away[key] = self.piece[at : at + x.nbytes].view(x.dtype).view(x.shape)
                at += room(x)
                to.copy_(x, non_blocking=True)
                # not before the copy is done may others have the memory
                x.record_stream(lane(device))

    def fetch(self):
        """Begin to bring it back."""
        if self.there is None:
            with torch.cuda.stream(lane(self.device)):
                self.there = {key: x.to(self.device, non_blocking=True) for key, x in self.away.items()}
            self.done = lane(self.device).record_event()
            # copies of later trees into this memory come behind these on the same stream
            free.setdefault(len(self.piece), []).append(self.piece)
            self.away = self.piece = None

    def back(self):
        """The tree on the device."""
        self.fetch()
        now, there = torch.cuda.current_stream(self.device), self.there
        now.wait_event(self.done)
        for x in there.values():
            x.record_stream(now)
        return filled(self.tree, there)


class Place(NamedTuple):
    """Where an array of a tree is: the i-th of those of this kind."""

    kind: tuple
    i: int


def filled(tree, there):
    if isinstance(tree, Place):
        return there[tree.kind][tree.i]
    if isinstance(tree, dict):
        return {k: filled(x, there) for k, x in tree.items()}
    return type(tree)(filled(x, there) for x in tree) if isinstance(tree, list | tuple) else tree


def room(x):
    """Bytes for an array, so that the next one begins at a multiple of LINE."""
    return -(-x.nbytes // LINE) * LINE


@functools.cache
def lane(device):
    return torch.cuda.Stream(device)


free, coming = {}, {}  # by their length: pieces that nobody uses, and those that threads are at work on


@functools.cache
def threads():
    return ThreadPoolExecutor(AHEAD)


def piece(n, more):
    """n bytes of the host's memory that copies to and from the device go by."""
    if n == 0:
        return torch.empty(0, dtype=torch.uint8)
    if free.get(n):
        return free[n].pop()
    # the first trees of a row are each of a size of their own
    wanted, ahead = min(AHEAD, more + 1) if n in coming else 1, coming.setdefault(n, [])
    while len(ahead) < wanted:
        ahead.append(threads().submit(locked, n))
    return ahead.pop(0).result()


def locked(n):
    """n bytes, page-locked where there is room for them."""
    if available() - n < SPARE:
        return on_disk(n)
    memory = mmap.mmap(-1, n)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    x = torch.frombuffer(memory, dtype=torch.uint8)
    # for good: the same memory is used until the process ends
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), n, 0)))
    return x


def on_disk(n):
    with tempfile.TemporaryFile() as file:
        file.truncate(n)
        return torch.frombuffer(mmap.mmap(file.fileno(), n), dtype=torch.uint8)


def available():
    """Bytes of the host's memory that are free, by what the machine says and by what this process's group may have of it."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min([free, *(room for folder, *names in GROUPS if (room := allowed(Path(folder), *names)) is not None)])


GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def allowed(folder, most, now):
    """Bytes that a control group still has, or None if there is none, or no limit. Files' contents that are kept count as free."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / most).read_text()) - int((folder / now).read_text()) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return None

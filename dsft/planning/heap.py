"""What a sequence of allocations makes of the C library's heap; loads no torch.

On CPU the peak that counts is the process's resident memory, and it is more than the tensors that live. glibc serves
blocks below a threshold from its heap and aligns each of torch's to 64 bytes. What lies between two of them is soon
taken by small objects, and before glibc 2.38 a freed block then cannot hold the next one of the same size. By how much
the heap exceeds the tensors depends on the sizes, the order and the glibc, so no factor says it. The sequence is played
to this machine's own malloc instead, in a process of its own that never writes into the blocks.
"""

import array
import ctypes
import subprocess
import sys
from collections import deque
from collections.abc import Sequence

ALIGNMENT = 64  # of torch's tensors on CPU
SMALL = (24, 40, 56, 72, 88)  # bytes; after each tensor, as nodes of the graph and their like: they fill the gaps
RECENT = 8  # tensors; nodes of the graph live as long as what is saved near them
M_MMAP_THRESHOLD = -3  # malloc.h
LOOK_EVERY = 50  # allocations


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = (
        ("arena", ctypes.c_size_t),  # of the heap
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),  # of mapped blocks
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def heap_peaks(events: Sequence[tuple[int, int]], repeats: int, threshold: int) -> list[tuple[int, int]] | None:
    """For each repeat the highest memory so far, and of it the heap, which stays; None without glibc 2.33 or newer.

    The heap is given back at its end only, which some small object will keep; so all of it stays.

    Args:
        events: (number, bytes) where a tensor is made, (number, 0) where it is freed.
        repeats: how often the sequence runs. What it leaves unfreed is freed at its end.
        threshold: bytes from which a block is mapped by itself, and given back when it is freed.
    """
    flat = array.array("q", [repeats, threshold])
    for event in events:
        flat.extend(event)
    done = subprocess.run([sys.executable, "-I", __file__], input=flat.tobytes(), capture_output=True, check=False)
    if done.returncode:
        return None
    numbers = [int(word) for word in done.stdout.split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _replay(events: list[tuple[int, int]], repeats: int, threshold: int) -> list[int]:
    """Peak and heap of each repeat, one after the other."""
    library = ctypes.CDLL("libc.so.6")
    library.mallinfo2.restype = _MallInfo
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    library.mallopt(M_MMAP_THRESHOLD, threshold)
    before = library.mallinfo2()
    start, peak, heap, peaks = before.arena + before.hblkhd, 0, 0, []
    place = ctypes.c_void_p()
    owners = _owners(events)
    for _ in range(repeats):
        held: dict[int, int] = {}
        small: dict[int, list[int]] = {}
        for index, (number, size) in enumerate(events):
            if size:
                if library.posix_memalign(ctypes.byref(place), ALIGNMENT, size):
                    raise MemoryError
                held[number] = place.value or 0
                small.setdefault(owners[number], []).extend(library.malloc(count) for count in SMALL)
            else:
                library.free(held.pop(number))
                for block in small.pop(number, ()):
                    library.free(block)
            if size >= threshold or index % LOOK_EVERY == 0:
                now = library.mallinfo2()
                peak = max(peak, now.arena + now.hblkhd - start)
                heap = max(heap, now.arena - before.arena)
        for block in (*held.values(), *(block for blocks in small.values() for block in blocks)):
            library.free(block)
        peaks += [peak, heap]
    return peaks


def _owners(events: Sequence[tuple[int, int]]) -> dict[int, int]:
    """With which tensor the small objects beside a tensor go: the longest-lived of the last few."""
    ends = {number: place for place, (number, size) in enumerate(events) if not size}
    recent: deque[int] = deque(maxlen=RECENT)
    owners = {}
    for number, size in events:
        if size:
            recent.append(number)
            owners[number] = max(recent, key=lambda one: ends.get(one, len(events)))
    return owners


if __name__ == "__main__":
    numbers = array.array("q", sys.stdin.buffer.read())
    print(*_replay(list(zip(numbers[2::2], numbers[3::2], strict=True)), numbers[0], numbers[1]))

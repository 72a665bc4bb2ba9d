"""Configures glibc's malloc, for processes that allocate large buffers for a short time."""

import ctypes

# Names and values from glibc's malloc.h
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 16 << 20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 4 << 20


def bound_malloc() -> None:
    """Make glibc return large blocks to the system. By default its thresholds grow, and it keeps ever larger blocks."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)

"""Seconds since this process was started, the interpreter's own start included."""

import os
import time
from pathlib import Path

_STARTTIME = 19  # field 22 of proc(5) stat, counted after the command's closing bracket


def seconds_since_start() -> float | None:
    """Wall clock seconds since the kernel started this process; None where the system does not tell.

    Source: ``starttime`` of proc(5), in clock ticks after boot.
    """
    try:
        fields = (
            Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
        since_boot = int(fields[_STARTTIME]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, ValueError, IndexError, AttributeError):
        return None

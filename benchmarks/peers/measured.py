"""Run a command, and write its CPU seconds and its peak memory to a file: measured.py FILE COMMAND...

A process of its own, because Linux counts the memory of the process that starts a command as memory of the command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    file, *command = sys.argv[1:]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    found = {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}
    Path(file).write_text(json.dumps(found), encoding="utf-8")
    sys.exit(os.waitstatus_to_exitcode(status))

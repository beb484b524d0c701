"""Profile the kernels with Nsight Compute: writes profile.ncu-rep for its window, and text to the log.

Clocks are not locked: locking needs permissions, and would disturb other work on the GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

KERNELS = "document_scores|select_pool|pool_topk|copy_rows|sum_rows|send_kernel"
LAUNCHES = 8


def main() -> int:
    """Profile, then print the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--tokens", type=int, default=65536)
    options = parser.parse_args()
    report = options.output / "profile"
    script = str(Path(__file__).with_name("launches.py"))
    profiled = [sys.executable, script, "--device", options.device, "--tokens", str(options.tokens)]
    profile = ["ncu", "--set", "full", "--clock-control", "none"]
    profile += ["--kernel-name", f"regex:{KERNELS}", "--launch-count", str(LAUNCHES)]
    profile += ["--force-overwrite", "--export", str(report)]
    done = subprocess.run([*profile, *profiled], text=True, capture_output=True)
    print(done.stdout, done.stderr)
    problems = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "==ERROR==" in line or "No kernels were profiled" in line
    ]
    written = report.with_suffix(".ncu-rep")
    if done.returncode or problems or not written.exists():
        print(f"ncu failed, status {done.returncode}: {'; '.join(problems) or 'no report'}")
        return 1
    details = ["ncu", "--import", str(written), "--page", "details"]
    text = subprocess.run(details, text=True, capture_output=True, check=True).stdout
    (options.output / "details.txt").write_text(text)
    print(f"{LAUNCHES} launches at most; details.txt has {len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())

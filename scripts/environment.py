"""Where a measurement was made: versions, commit and machine, for the raw row behind every number."""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "faiss-cpu", "hf-subquad")
# Settings of the process that change speed.
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD", "ATEN_CPU_CAPABILITY", "GLIBC_TUNABLES")


def provenance() -> dict[str, Any]:
    """Versions (None for what is not installed), commit, machine, the command line and the time (UTC)."""
    versions = {name.removesuffix("-cpu").replace("-", "_"): _version(name) for name in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
        },
        "command": shlex.join([Path(sys.executable).name, _in_repository(sys.argv[0]), *sys.argv[1:]]),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _in_repository(script: str) -> str:
    """Its path below the root of this repository, wherever that lies; unchanged if it is elsewhere."""
    root, path = Path(__file__).resolve().parents[1], Path(script).resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else script


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of this repository, with "+changes" if the working tree differs from it; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()

"""Say on a GPU whether the kernels are right, and how fast everything is, in one call of a few minutes.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --only device correctness
    TRITON_INTERPRET=1 python scripts/gpu_check.py --tiny --device cpu

Sections run in order of importance, each in a process of its own: one that hangs is stopped, one that crashes or loses
the device leaves the others, and rows are kept as they come. Exit status: 0, 1 if something failed or a check did not
pass, 2 if there is nothing to run on.
"""

import argparse
import gc
import importlib.util
import os
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparison.apart import WorkerError, run_apart
from environment import provenance
from gpu.report import markdown, problems
from reporting import write_json, write_whole

FOLDER = Path(__file__).resolve().parent
# In order of importance, and how much of the time each may take, if those before it have left nothing over.
SECTIONS = {"device": 2, "correctness": 5, "layers": 4, "step": 10, "profile": 2, "kernels": 2}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if why := unusable(args):
        print(why, file=sys.stderr)
        return 2
    if args.start == "fork" and args.minutes > 0:
        _ = [_import(name) for name in args.only]  # once for all processes
        gc.freeze()  # so that they need not look through all that when they collect garbage
    started = time.monotonic()
    results: dict[str, Any] = {
        "device": "", "settings": {"minutes": args.minutes, "tiny": args.tiny, "device": args.device},
        "sections": {name: {"state": "skipped", "seconds": 0.0, "rows": [], "errors": []} for name in args.only},
        "provenance": provenance(),
    }  # fmt: skip

    def save() -> None:
        results["seconds"] = time.monotonic() - started
        results["problems"] = problems(results)
        rows = (row for section in results["sections"].values() for row in section["rows"])
        results["device"] = next((row["name"] for row in rows if "name" in row), "")
        device = "".join(c if c.isalnum() else "-" for c in (results["device"] or args.device).lower())
        path = args.output / (device + "-tiny" * args.tiny)
        write_json(results, path.with_suffix(".json"))
        write_whole(path.with_suffix(".md"), lambda file: file.write_text(markdown(results), encoding="utf-8"))

    for number, name in enumerate(args.only):
        begun = time.monotonic()
        left = 60 * args.minutes - (begun - started)
        if left > 0:
            section = results["sections"][name]
            section["state"] = "cut off"  # what stays if this process is killed
            seconds = left * SECTIONS[name] / sum(map(SECTIONS.get, args.only[number:]))
            run_section(args, name, section, seconds, save)
            section["state"] = "failed" if section["errors"] else "done"
            section["seconds"] = time.monotonic() - begun
        save()
    print(markdown(results))
    return 1 if results["problems"] else 0


def unusable(args: argparse.Namespace) -> str | None:
    """Why nothing can run here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if args.device == "cpu" and not (args.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        return "a CPU runs the kernels in Triton's interpreter, slowly: add --tiny, and set TRITON_INTERPRET=1"
    query = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if args.device == "cuda" and subprocess.run([sys.executable, "-c", query]).returncode:
        return "PyTorch finds no CUDA device; without one only --tiny --device cpu runs, with TRITON_INTERPRET=1"
    return None


def run_section(
    args: argparse.Namespace, name: str, section: dict[str, Any], seconds: float, save: Callable[[], None]
) -> None:
    """Run a section in a process of its own; take down what it sends, and save it at once."""
    case = None

    def hear(message: dict[str, Any]) -> None:
        nonlocal case
        case = message.get("begin", case)
        if "row" in message:
            section["rows"].append({"case": case, **message["row"]})
            save()
        if "error" in message:
            section["errors"].append({"case": case, "traceback": message["error"]})

    try:
        run_apart(name, serve, (args, name), hear, args.start, args.patience, seconds)
    except WorkerError as error:
        section["errors"].append({"case": case, "traceback": str(error)})


def serve(argument: tuple[argparse.Namespace, str], report: Callable[[dict[str, Any]], None]) -> None:
    """Run one section in this process."""
    args, section = argument
    os.dup2(2, 1)  # only the tables go to standard output
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    if args.device == "cpu":
        torch.set_num_threads(1)
    bench = _import("bench").Bench(torch.device(args.device), args.tiny, report)
    for name, run in _import(section).cases(bench):
        print(f"{section}: {name}", flush=True)
        report({"begin": name})
        try:
            for row in run():
                report({"row": row})
        except Exception:
            report({"error": traceback.format_exc()})


def _import(module: str) -> Any:
    """A module of the folder gpu, and the library."""
    sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent / "recipes")]
    if importlib.util.find_spec("faiss") is None:  # the library imports it for queries that nothing here makes
        stand_in: Any = types.ModuleType("faiss")
        stand_in.METRIC_INNER_PRODUCT, stand_in.index_factory = 0, lambda *_: None
        stand_in.__spec__ = importlib.machinery.ModuleSpec("faiss", None)  # the mark of what can be found
        sys.modules["faiss"] = stand_in
    return importlib.import_module(f"gpu.{module}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "gpu", help="of DEVICE.json and DEVICE.md")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds; what is silent for longer is stopped")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--start", choices=("spawn", "fork"), help="of its processes; spawn on a GPU")
    args = parser.parse_args(argv)
    args.only = [name for name in SECTIONS if name in args.only]
    args.start = args.start or ("spawn" if args.device == "cuda" else "fork")
    return args


if __name__ == "__main__":
    sys.exit(main())

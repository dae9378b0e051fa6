"""Say on a GPU whether the kernels are right, and how fast everything is, in one call of a few minutes.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --only device,correctness
    TRITON_INTERPRET=1 python scripts/gpu_check.py --tiny --device cpu

Sections run in order of importance, each in a process of its own: one that hangs is stopped, one that crashes or loses
the device leaves the others, and rows are kept as they come. Exit status: 0, 1 if something failed or a check did not
pass, 2 if there is nothing to run on.
"""

import argparse
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environment import provenance
from gpu.report import COLUMNS, markdown, problems
from reporting import write_json, write_whole

FOLDER = Path(__file__).resolve().parent
SECTIONS = tuple(COLUMNS)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.section:
        serve(args)
        return 0
    if why := unusable(args):
        print(why, file=sys.stderr)
        return 2
    started = time.monotonic()
    results: dict[str, Any] = {
        "device": "", "settings": {"minutes": args.minutes, "tiny": args.tiny, "device": args.device},
        "sections": {name: {"state": "skipped", "seconds": 0.0, "rows": [], "errors": []} for name in args.only},
        "provenance": provenance(),
    }  # fmt: skip
    path = None
    for name in args.only:
        begun = time.monotonic()
        left = 60 * args.minutes - (begun - started)
        if left > 0:
            section = results["sections"][name]
            run_section(args, name, section, left)
            section["state"] = "failed" if section["errors"] else "done"
            section["seconds"] = time.monotonic() - begun
            results["device"] = results["device"] or next((r["name"] for r in section["rows"] if "name" in r), "")
        results["seconds"] = time.monotonic() - started
        results["problems"] = problems(results)
        device = "".join(c if c.isalnum() else "-" for c in (results["device"] or args.device).lower())
        path = args.output / (device + "-tiny" * args.tiny)
        write_json(results, path.with_suffix(".json"))
        write_whole(path.with_suffix(".md"), lambda file: file.write_text(markdown(results), encoding="utf-8"))
    print(markdown(results))
    return 1 if results["problems"] else 0


def unusable(args: argparse.Namespace) -> str | None:
    """Why nothing can run here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if args.device == "cpu" and not args.tiny:
        return "a CPU runs the kernels in Triton's interpreter, thousands of times slower: add --tiny"
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "a CPU runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1"
    query = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if args.device == "cuda" and subprocess.run([sys.executable, "-c", query]).returncode:
        return "PyTorch finds no CUDA device; without one only --tiny --device cpu runs, with TRITON_INTERPRET=1"
    return None


def run_section(args: argparse.Namespace, name: str, section: dict[str, Any], seconds: float) -> None:
    """Run a section in a process of its own, and take down what it sends."""
    reading, writing = os.pipe()
    command = [sys.executable, __file__, "--section", name, "--pipe", str(writing), "--device", args.device]
    command += ["--tiny"] * args.tiny + [f"--broken={name}={how}" for each, how in args.broken if each == name]
    process = subprocess.Popen(command, stdout=sys.stderr, pass_fds=[writing], start_new_session=True)
    os.close(writing)
    until, case, over, buffered = time.monotonic() + seconds, None, False, b""
    while True:
        patience = min(args.patience, max(0.0, until - time.monotonic()))
        if not select.select([reading], [], [], patience)[0]:
            why = f"stopped: it sent nothing for {args.patience:.0f} s" if patience == args.patience else "time is over"
            section["errors"].append({"case": case, "traceback": why})
            break
        received = os.read(reading, 1 << 16)
        if not received:
            code = process.wait()
            if not over:
                why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
                section["errors"].append({"case": case, "traceback": f"the process {why}"})
            break
        *lines, buffered = (buffered + received).split(b"\n")
        for message in map(json.loads, lines):
            case, over = message.get("begin", case), over or "over" in message
            if "row" in message:
                section["rows"].append({"case": case, **message["row"]})
            if "error" in message:
                section["errors"].append({"case": case, "traceback": message["error"]})
    os.close(reading)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
    process.wait()


def serve(args: argparse.Namespace) -> None:
    """Run one section in this process."""
    pipe = os.fdopen(args.pipe, "w", buffering=1)

    def send(**message: Any) -> None:
        pipe.write(json.dumps(message, default=str) + "\n")

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        cases = [*_broken(dict(args.broken).get(args.section)), *_cases(args)]
    except Exception:
        return send(error=traceback.format_exc(), over=True)
    for name, run in cases:
        print(f"{args.section}: {name}", flush=True)
        send(begin=name)
        try:
            for row in run():
                send(row=row)
        except Exception:
            send(error=traceback.format_exc())
    send(over=True)


def _cases(args: argparse.Namespace) -> Any:
    sys.path[:0] = [str(FOLDER.parent)]
    import torch

    if importlib.util.find_spec("faiss") is None:  # the library imports it for queries that nothing here makes
        module: Any = types.ModuleType("faiss")
        module.METRIC_INNER_PRODUCT, module.index_factory = 0, lambda *_: None
        sys.modules["faiss"] = module
    from gpu import correctness, device, kernels, layers
    from gpu.bench import Bench

    if args.device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(torch.device(args.device), args.tiny)
    return {
        "device": device.cases, "correctness": correctness.cases, "layers": layers.layer_cases,
        "kernels": kernels.cases, "step": layers.step_cases,
    }[args.section](bench)  # fmt: skip


def _broken(how: str | None) -> Iterator[Any]:
    """A first case that goes wrong, if asked for."""

    def fail() -> Iterator[dict[str, Any]]:
        yield {"what": "a case that goes wrong on purpose"}
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(3600)
        raise RuntimeError("made to fail")

    if how:
        yield "broken on purpose", fail


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "gpu", help="of DEVICE.json and DEVICE.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--only", type=_sections, default=SECTIONS, help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds; what is silent for longer is stopped")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    # Of the process of a section; and to try what happens then: SECTION=raise, exit or hang.
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--broken", type=lambda text: text.split("="), action="append", default=[], help=argparse.SUPPRESS
    )
    return parser.parse_args(argv)


def _sections(text: str) -> tuple[str, ...]:
    wanted = text.split(",")
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown sections {unknown}; known are {list(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in wanted)


if __name__ == "__main__":
    sys.exit(main())

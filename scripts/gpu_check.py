"""Say on a GPU whether the kernels are right, and how fast everything is, in one call of a few minutes.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --only device,correctness
    TRITON_INTERPRET=1 python scripts/gpu_check.py --tiny --device cpu

Sections run in order of importance, each in what is left of the time; what does not fit is listed as skipped. The
sections run in a process of their own: one that hangs is stopped, one that crashes or loses the device is started
anew, and results are written after every case. Exit status: 0, 1 if a section failed or a check did not pass, 2 if
there is nothing to run on.
"""

import argparse
import os
import sys
from pathlib import Path

from environment import provenance
from gpu.report import head, markdown
from gpu.settings import SHARES, Settings
from gpu.supervisor import Supervisor, Unusable

_RESULTS = Path(__file__).resolve().parent / "results" / "gpu"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    settings = Settings(
        output=args.output, sections=args.only, minutes=args.minutes, sweep=args.sweep, tiny=args.tiny,
        device=args.device, vocabulary=args.vocabulary or (64 if args.tiny else 32000), patience=args.patience,
        broken=dict(args.broken),
    )  # fmt: skip
    if why := _unusable(settings):
        print(why, file=sys.stderr)
        return 2
    supervisor = Supervisor(settings, provenance())
    try:
        supervisor.run()
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    supervisor.save()
    print(supervisor.text(markdown))
    print(supervisor.text(head))  # again, where it is seen
    return 1 if supervisor.results["problems"] else 0


def _unusable(settings: Settings) -> str | None:
    if settings.device != "cpu":
        return None  # PyTorch knows, which is not loaded here
    if not settings.tiny:
        return "a CPU runs the kernels in Triton's interpreter, thousands of times slower: add --tiny"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "a CPU runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1"
    return None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder of DEVICE.json and DEVICE.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--only", type=_sections, default=tuple(SHARES), help=f"of {','.join(SHARES)}")
    parser.add_argument("--sweep", action="store_true", help="keep time for the sweep; else it gets what is left")
    parser.add_argument("--vocabulary", type=int, help="of the model in the section step (default 32000)")
    parser.add_argument("--patience", type=float, default=90.0, help="seconds; a case silent for longer is stopped")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    # To try what happens then: SECTION=raise, exit or hang.
    parser.add_argument(
        "--broken", type=lambda text: text.split("="), action="append", default=[], help=argparse.SUPPRESS
    )
    return parser.parse_args(argv)


def _sections(text: str) -> tuple[str, ...]:
    wanted = text.split(",")
    unknown = [name for name in wanted if name not in SHARES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown sections {unknown}; known are {list(SHARES)}")
    return tuple(name for name in SHARES if name in wanted)


if __name__ == "__main__":
    sys.exit(main())

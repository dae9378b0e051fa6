"""Fine-tune the language model in this repository three ways, side by side, in 3 to 10 minutes on two cores.

    python scripts/demo.py                      # writes demo_output/
    python scripts/demo.py --steps 30           # a shorter look

The model was pre-trained on Python source (demo_model/README.md). Here it learns English prose that every Python
installation carries, the language reference: `vanilla` is the plain Trainer, which trains every weight; `lora` is PEFT
on all linear layers; `subquad` is the README's three lines: low-rank updates in the patched MLPs, all else trained in
full. It is a thin layer over compare_vanilla.py.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare_vanilla import METHODS, compare
from comparison.apart import WorkerError
from comparison.report import table, write_plot
from comparison.settings import RunSettings
from reporting import plots_available, write_json, write_whole

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "demo_model"

# Each method's best of a short search (60 steps, held-out loss): vanilla 1e-3: 4.213, 2e-3: 4.183, 3e-3: 4.221;
# lora 5e-3: 4.492, 1e-2: 4.413, 1.5e-2: 4.399, 3e-2: 4.938; subquad at vanilla's 2e-3, with alpha 16: 4.224,
# 64: 4.213, 256: 4.197 (at a rate that suits full weights, low-rank updates learn slowly with the usual alpha = rank).
LEARNING_RATES = {"vanilla": 2e-3, "lora": 1.5e-2, "subquad": 2e-3}
SUBQUAD = {"alpha": 256.0}

NOTE = """\
What this shows: the shapes of the demo model (MLPs {ratio:.0f} times as wide as its hidden size) were chosen so that
the MLPs dominate a training step, as they do in large language models at their usual 4x. The smaller the share of a
step that is spent in MLPs, the smaller the gain; the Amdahl limits above say what was possible here. Losses are of
held-out text under the dense forward, which is what the saved checkpoint computes."""


def language_reference_text() -> tuple[list[str], list[str]]:
    """Topics of Python's language reference, English prose: (training documents, held-out documents).

    Every fourth topic, in alphabetical order, is held out. Long topics repeat paragraphs of short ones: of those only
    the first stays, and none that is held out stays in the training text.
    """
    from pydoc_data.topics import topics

    documents = [topics[name].split("\n\n") for name in sorted(topics)]
    held_out = documents[3::4]
    train = [paragraphs for index, paragraphs in enumerate(documents) if index % 4 != 3]
    seen: set[str] = set()
    held_out_texts = _without(seen, held_out)
    return _without(seen, train), held_out_texts


def _without(seen: set[str], documents: list[list[str]]) -> list[str]:
    """Documents without the paragraphs in `seen`, which is added to."""
    texts = []
    for paragraphs in documents:
        fresh = [text for text in dict.fromkeys(paragraphs) if text not in seen]
        seen.update(fresh)
        if any(text.strip() for text in fresh):
            texts.append("\n\n".join(fresh))
    return texts


def write_texts(folder: Path) -> dict[str, str]:
    """The two text files, as `train_file` and `eval_file`; JSON lines, one topic a line."""
    files = {}
    for name, documents in zip(("train", "eval"), language_reference_text(), strict=True):
        path = folder / f"{name}.jsonl"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        write_whole(path, lambda file, lines=lines: file.write_text(lines, encoding="utf-8"))
        files[f"{name}_file"] = str(path)
    return files


def demo_runs(options: argparse.Namespace) -> dict[str, RunSettings]:
    files = write_texts(options.output)
    return {
        method: RunSettings(
            method=method,
            learning_rate=LEARNING_RATES[method],
            model=str(MODEL),
            steps=options.steps,
            batch_size=8,
            seq_length=256,
            scheduler="cosine",
            lr_warmup_steps=max(1, options.steps // 20),
            eval_every=max(1, options.steps // 8),
            max_eval_rows=64,
            seed=options.seed,
            threads=options.threads,
            untimed_steps=1,
            profile_steps=1,
            rest="full",
            subquad=SUBQUAD,
            save_to=str(options.output / "checkpoint") if method == "subquad" else None,
            **files,
        )
        for method in METHODS
    }


def check_checkpoint(folder: Path, run: RunSettings) -> dict[str, Any]:
    """Load subquad's checkpoint in a fresh Python process that cannot import hf_subquad nor PEFT.

    Returns:
        eval_loss, as measured there on the comparison's held-out text; prompt; text generated from it.

    Raises:
        RuntimeError: it does not load; the message has the traceback.
    """
    same = ("eval_file", "seq_length", "max_eval_rows", "batch_size", "threads")
    options = {"folder": str(folder), **{name: getattr(run, name) for name in same}}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "check_plain.py"), json.dumps(options)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the checkpoint {folder} is not plain:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for all results")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    if options.steps < 4:
        parser.error(f"--steps must be at least 4, got {options.steps}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    runs, folder = demo_runs(options), options.output / "checkpoint"
    print("vanilla, lora and subquad train, then take turns on the same batches; 3 to 10 minutes on two free cores")
    try:
        report = compare(runs)
        checked = check_checkpoint(folder, runs["subquad"])
    except (WorkerError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = report | {"plain_checkpoint": checked}
    write_json(report, options.output / "comparison.json")
    if plots_available():
        write_plot(report, options.output / "loss_against_time.png", "demo model, language reference")
    print(table(report))
    print(
        f"{folder} is a plain Hugging Face checkpoint: a fresh process without hf_subquad and PEFT got held-out loss "
        f"{checked['eval_loss']:.4f} from it (in training: {report['methods']['subquad']['eval_loss_dense']:.4f}), and "
        f"generates:\n  {checked['prompt']!r} -> {checked['text']!r}"
    )
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    print(NOTE.format(ratio=config["ffn_dim"] / config["hidden_size"]))
    print(f"JSON and picture are in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

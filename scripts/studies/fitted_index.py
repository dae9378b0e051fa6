"""What a plan saves with an index made from the weights alone, and with one fitted to the inputs.

python scripts/studies/fitted_index.py --models relu-opt-14m smollm2-135m --train-file gsm8k/train.jsonl
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "recipes")]

from comparison.inputs import padded_batches
from reporting import conclude, text_table
from settings import LmSettings

from hf_subquad import SubquadConfig, calibrate
from hf_subquad.index.choose_neurons import ActivationIndex

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--models", nargs="+", required=True)
parser.add_argument("--train-file", required=True, help=".jsonl with question and answer")
parser.add_argument("--tolerances", type=float, nargs="+", default=[SubquadConfig().tolerance, 0.003])
parser.add_argument("--json", type=Path, metavar="FILE")
options = parser.parse_args()
rows, fit = [], ActivationIndex.fit
for name in options.models:
    data = {"prompt_template": "Question: {question}\\nAnswer:", "answer_template": " {answer}"}
    data |= {"train_file": options.train_file, "eval_file": options.train_file, "max_length": 512, "max_train_rows": 24}
    batches = padded_batches(LmSettings(model=name, method="subquad", output_dir="unused", **data), "train", 8)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    for tolerance in options.tolerances:
        for index in ("from the weights", "fitted"):
            ActivationIndex.fit = fit if index == "fitted" else lambda self, tokens: None
            plan = calibrate(model, batches, tolerance=tolerance)
            share = mean(layer.predicted / layer.neurons for layer in plan.layers)
            context = mean(layer.context / layer.neurons for layer in plan.layers)
            speed = sum(x.dense_ms for x in plan.layers) / sum(x.sparse_ms for x in plan.layers)
            row = [Path(name).name, f"{tolerance:g}", index, f"{share:.1%}", f"{context:.1%}", f"{speed:.2f}x"]
            rows.append(
                dict(zip(HEAD := ["model", "tolerance", "index", "predicted", "context", "MLPs"], row, strict=True))
            )
            print(row, flush=True)
conclude({"rows": rows}, text_table(HEAD, [list(row.values()) for row in rows]), options)

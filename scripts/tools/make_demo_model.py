"""Train the small language model that ships with this repository, from text that ships with Python.

    python scripts/tools/make_demo_model.py             # 5000 steps, 4.5 a second on 2 free cores with AMX
    python scripts/tools/make_demo_model.py --check     # one minute: what this machine would reach

An OPT model with ReLU whose MLPs hold most of the weights, as in large models, so that its activations are
sparse for the reason that theirs are: training. It is for demonstrations and tests only.
"""

import argparse
import contextlib
import ctypes
import hashlib
import math
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from corpus import HELD_OUT_EVERY, standard_library_text

FOLDER = Path(__file__).resolve().parents[1] / "demo_model"
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
BLOCK = 512  # tokens of a training sequence, and the model's number of positions


@dataclass(frozen=True)
class Training:
    """How the model is trained. `minutes` is a limit: the schedule ends with whichever of the two comes first."""

    steps: int = 5000
    minutes: float = 19.0
    batch_size: int = 4
    learning_rate: float = 2e-3
    warmup_steps: int = 150
    weight_decay: float = 0.05
    seed: int = 0


def keep_freed_memory() -> None:
    """Ask glibc to reuse large freed blocks: returning them each step costs a third of the training time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=BLOCK,
        clean_up_tokenization_spaces=False,
    )


def model_config() -> OPTConfig:
    """The shape: 7.3 million weights, 81% of them in the MLPs; 14.6 MB in bf16."""
    return OPTConfig(
        vocab_size=4096,
        hidden_size=160,
        word_embed_proj_dim=160,
        ffn_dim=3072,
        num_hidden_layers=6,
        num_attention_heads=5,
        max_position_embeddings=BLOCK,
        activation_function="relu",
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )


def to_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents in one row of token ids (int64), each closed by the end token."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(documents)
    return torch.tensor([i for e in encoded for i in [*e.ids, tokenizer.eos_token_id]])


class Batches:
    """Endless batches of blocks: each epoch shifts the block borders and shuffles the blocks."""

    def __init__(self, stream: torch.Tensor, batch_size: int, seed: int) -> None:
        self.stream, self.batch_size = stream, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.waiting: list[torch.Tensor] = []

    def next(self) -> torch.Tensor:
        """Token ids [batch_size, BLOCK]."""
        while len(self.waiting) < self.batch_size:
            shift = int(torch.randint(BLOCK, (1,), generator=self.generator))
            count = (len(self.stream) - shift) // BLOCK
            blocks = self.stream[shift : shift + count * BLOCK].view(count, BLOCK)
            self.waiting += list(blocks[torch.randperm(count, generator=self.generator)])
        batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
        return torch.stack(batch)


def train(model: OPTForCausalLM, stream: torch.Tensor, how: Training) -> tuple[int, float]:
    """Train in place, fp32 weights under bf16 autocast. Returns (steps done, seconds)."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": how.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=how.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    batches = Batches(stream, how.batch_size, how.seed)
    model.train()
    start, step, progress = time.perf_counter(), 0, 0.0
    with tqdm(total=how.steps, unit="step") as bar:
        while progress < 1.0:
            warmup = min(1.0, (step + 1) / how.warmup_steps)
            rate = how.learning_rate * warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids = batches.next()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            progress = max(step / how.steps, (time.perf_counter() - start) / (60 * how.minutes))
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return step, time.perf_counter() - start


@torch.no_grad()
def held_out(model: OPTForCausalLM, stream: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """(mean loss in nats per token; per layer, how often each neuron fires [m]) on the held-out stream."""
    shares: list[list[torch.Tensor]] = [[] for _ in model.model.decoder.layers]
    hooks = [
        layer.fc2.register_forward_pre_hook(
            lambda _, inputs, kept=kept: kept.append((inputs[0] > 0).flatten(0, -2).float().mean(0))
        )
        for layer, kept in zip(model.model.decoder.layers, shares, strict=True)
    ]
    model.eval()
    losses = []
    count = len(stream) // BLOCK
    for ids in stream[: count * BLOCK].view(count, BLOCK).split(8):
        losses += [model(input_ids=ids, labels=ids).loss.item()] * len(ids)
    for hook in hooks:
        hook.remove()
    return sum(losses) / len(losses), [torch.stack(kept).mean(0) for kept in shares]


CARD = """---
license: other
license_name: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [opt, relu, demo]
---
# Demo model: a small OPT with wide, sparse MLPs

Made by `python scripts/tools/make_demo_model.py` from text that comes with Python. It exists so that the comparison of
`make demo` runs on a really trained model without a download. It is for demonstrations and tests, and of no use for
writing code or text.

| | |
|---|---|
| architecture | OPT, ReLU, pre-norm, {layers} layers, hidden size {hidden}, {neurons} neurons a layer, {heads} heads, \
{positions} positions, tied embeddings |
| weights | {weights:,}, of them {mlp_share:.0%} in the MLPs; stored in bf16, {megabytes:.1f} MB |
| tokenizer | byte-level BPE, {vocabulary} tokens, trained on the training part of the corpus |
| corpus | source of the standard library of Python {python} without its tests, `encodings` and `pydoc_data`: \
{train_documents} files, {train_tokens:,} tokens; sha256 of the text `{digest}` |
| held out | every {held_every}th file: {held_documents} files, {held_tokens:,} tokens |
| training | {steps} steps of {batch} x {block} tokens = {seen:,} tokens ({epochs:.1f} epochs), fused AdamW, peak \
learning rate {rate}, cosine, bf16 autocast, seed {seed}; {minutes:.0f} minutes with {threads} threads, on a machine \
that did other work too |
| **held-out loss** | **{loss:.3f} nats a token, {bits:.3f} bits a byte** (the saved bf16 weights, computed in fp32) |
| non-zero activations, held-out, by layer | {activations} |
| neurons that never fired on the held-out text, by layer | {silent} |
| `model.safetensors` | sha256 `{weights_digest}` |

Torch {torch}. The same seed, corpus and number of steps give the same schedule; another Python version has another
corpus, and another processor rounds differently. Here the training was ended by {ended}.

## Limits
- It has seen one small corpus of Python source and its English docstrings, and nothing else.
- The MLPs are wider, relative to the hidden size ({neurons} = {ratio:.1f} x {hidden}), than those of usual models (4x),
  to make them dominate the time of a training step as they do in large models.
- The first layer is much less sparse than the others, as in other ReLU models. In the middle layers many neurons never
  fire on the held-out text (table): making these layers sparse costs less here than in a model with fewer idle neurons.

## Licence of the text
The corpus is the Python standard library, copyright Python Software Foundation and its contributors, under the PSF
License Agreement version 2 (<https://docs.python.org/3/license.html>), with some modules under the compatible licences
listed there.
"""


def write_card(folder: Path, model: OPTForCausalLM, facts: dict[str, object]) -> None:
    config = model.config
    weights = sum(p.numel() for p in model.parameters())
    mlp = sum(p.numel() for name, p in model.named_parameters() if ".fc" in name)
    text = CARD.format(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        neurons=config.ffn_dim,
        heads=config.num_attention_heads,
        positions=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        ratio=config.ffn_dim / config.hidden_size,
        weights=weights,
        mlp_share=mlp / weights,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        block=BLOCK,
        **facts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def make(folder: Path, how: Training) -> None:
    train_documents, held_documents = standard_library_text()
    torch.manual_seed(how.seed)
    tokenizer = train_tokenizer(train_documents, model_config().vocab_size)
    train_stream, held_stream = to_stream(tokenizer, train_documents), to_stream(tokenizer, held_documents)
    print(f"{len(train_stream):,} tokens to train on, {len(held_stream):,} held out", flush=True)
    model = OPTForCausalLM(model_config())
    steps, seconds = train(model, train_stream, how)

    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss, activations = held_out(saved, held_stream)
    seen = steps * how.batch_size * BLOCK
    held_bytes = sum(len(text.encode()) for text in held_documents)
    facts: dict[str, object] = {
        "train_documents": len(train_documents),
        "held_documents": len(held_documents),
        "held_every": HELD_OUT_EVERY,
        "train_tokens": len(train_stream),
        "held_tokens": len(held_stream),
        "digest": hashlib.sha256("\0".join(train_documents).encode()).hexdigest()[:16],
        "steps": steps,
        "batch": how.batch_size,
        "seen": seen,
        "epochs": seen / len(train_stream),
        "rate": how.learning_rate,
        "seed": how.seed,
        "minutes": seconds / 60,
        "loss": loss,
        "bits": loss * len(held_stream) / held_bytes / math.log(2),
        "activations": ", ".join(f"{share.mean():.1%}" for share in activations),
        "silent": ", ".join(f"{(share == 0).float().mean():.0%}" for share in activations),
        "weights_digest": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "ended": "its number of steps" if steps >= how.steps else "its time limit",
    }
    write_card(folder, saved, facts)
    print(f"held-out loss {loss:.4f}; non-zero activations {facts['activations']}; wrote {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--minutes", type=float, default=Training.minutes, help="time limit of the training")
    parser.add_argument("--seed", type=int, default=Training.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="train for one minute and write nothing lasting")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    how = Training(steps=options.steps, minutes=options.minutes, seed=options.seed)
    if options.check:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), Training(steps=how.steps, minutes=1.0, seed=how.seed))
        return
    make(options.output, how)


if __name__ == "__main__":
    main()

"""Train the small language model that ships with this repository, from text that ships with Python.

    python scripts/tools/make_demo_model.py             # 5000 steps, 4.5 a second on 2 free cores with AMX
    python scripts/tools/make_demo_model.py --output /tmp/model --minutes 1     # what this machine would reach

An OPT model with ReLU whose MLPs hold most of the weights, as in large models, so that its activations are
sparse for the reason that theirs are: training. It is for demonstrations and tests only.
"""

import argparse
import contextlib
import ctypes
import hashlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from stdlib_functions import standard_library_files

FOLDER = Path(__file__).resolve().parents[1] / "demo_model"
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
BLOCK = 512  # tokens of a training sequence, and the model's number of positions
HELD_OUT_EVERY = 40  # files: about 2.5% of the text, from all parts of the library
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 4, 2e-3, 150, 0.05


def keep_freed_memory() -> None:
    """Ask glibc to reuse large freed blocks: returning them each step costs a third of the training time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def standard_library_text() -> tuple[list[str], list[str]]:
    """Source texts of the standard library: (training documents, held-out documents)."""
    documents = [path.read_text(encoding="utf-8", errors="replace") for path in standard_library_files()]
    documents = [text for text in documents if text.strip()]
    train = [text for index, text in enumerate(documents) if index % HELD_OUT_EVERY]
    return train, documents[::HELD_OUT_EVERY]


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


def endless_batches(stream: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Token ids [BATCH_SIZE, BLOCK]: each epoch shifts the block borders and shuffles the blocks."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[torch.Tensor] = []
    while True:
        while len(waiting) < BATCH_SIZE:
            shift = int(torch.randint(BLOCK, (1,), generator=generator))
            count = (len(stream) - shift) // BLOCK
            blocks = stream[shift : shift + count * BLOCK].view(count, BLOCK)
            waiting += list(blocks[torch.randperm(count, generator=generator)])
        yield torch.stack(waiting[:BATCH_SIZE])
        del waiting[:BATCH_SIZE]


def train(model: OPTForCausalLM, stream: torch.Tensor, steps: int, minutes: float, seed: int) -> tuple[int, float]:
    """Train in place, fp32 weights under bf16 autocast, until `steps` or `minutes` are over, with which the schedule
    ends. Returns (steps done, seconds)."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )
    batches = endless_batches(stream, seed)
    model.train()
    start, step, progress = time.perf_counter(), 0, 0.0
    with tqdm(total=steps, unit="step") as bar:
        while progress < 1.0:
            warmup = min(1.0, (step + 1) / WARMUP_STEPS)
            rate = LEARNING_RATE * warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids = next(batches)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            progress = max(step / steps, (time.perf_counter() - start) / (60 * minutes))
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


def make(folder: Path, most_steps: int, minutes: float, seed: int) -> None:
    """Train, save in bf16, and print what the model card in `folder` says."""
    train_documents, held_documents = standard_library_text()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(train_documents, model_config().vocab_size)
    train_stream, held_stream = to_stream(tokenizer, train_documents), to_stream(tokenizer, held_documents)
    print(f"{len(train_stream):,} tokens to train on, {len(held_stream):,} held out", flush=True)
    model = OPTForCausalLM(model_config())
    steps, seconds = train(model, train_stream, most_steps, minutes, seed)

    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loss, activations = held_out(OPTForCausalLM.from_pretrained(folder, dtype=torch.float32), held_stream)
    bits = loss * len(held_stream) / sum(len(text.encode()) for text in held_documents) / math.log(2)
    seen = steps * BATCH_SIZE * BLOCK
    print(
        f"corpus: {len(train_documents)} files, sha256 "
        f"{hashlib.sha256(chr(0).join(train_documents).encode()).hexdigest()[:16]}; held out: {len(held_documents)}\n"
        f"training: {steps} steps, {seen:,} tokens ({seen / len(train_stream):.1f} epochs), {seconds / 60:.0f} min\n"
        f"held-out loss {loss:.3f} nats a token, {bits:.3f} bits a byte\n"
        f"non-zero activations by layer: {', '.join(f'{share.mean():.1%}' for share in activations)}\n"
        f"silent neurons by layer: {', '.join(f'{(share == 0).float().mean():.0%}' for share in activations)}\n"
        f"sha256 of the weights: {hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()}\n"
        f"wrote {folder}; the card there, README.md, is written by hand"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=19.0, help="time limit of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    make(options.output, options.steps, options.minutes, options.seed)


if __name__ == "__main__":
    main()

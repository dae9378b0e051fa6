"""Time patching a model of given shapes: building the index of every layer, self-test included.

    python scripts/bench_patching.py --hidden 2048 --intermediate 8192 --layers 24 --json patching.json

The model is an OPT with random weights and a small vocabulary; the defaults are the shapes of OPT-1.3B.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from environment import commit, machine, versions
from transformers import OPTConfig, OPTForCausalLM

from hf_subquad import SubquadConfig, patch_model, sparse_mlps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--sketch-rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = OPTConfig(
        hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=args.intermediate, vocab_size=1024,
        num_hidden_layers=args.layers, num_attention_heads=max(1, args.hidden // 64), max_position_embeddings=128,
    )  # fmt: skip
    model = OPTForCausalLM(config)

    start = time.perf_counter()
    patch_model(model, SubquadConfig(layers_to_transform="all", sketch_rank=args.sketch_rank))
    patching = time.perf_counter() - start
    builds = []
    for mlp in sparse_mlps(model):
        start = time.perf_counter()
        mlp.index.build()
        builds.append(time.perf_counter() - start)

    row = {
        "hidden": args.hidden, "intermediate": args.intermediate, "layers": args.layers,
        "sketch_rank": args.sketch_rank, "dtype": "fp32", "threads": args.threads,
        "patching_seconds": patching, "index_build_seconds_median": sorted(builds)[len(builds) // 2],
        "index_build_seconds_max": max(builds), "versions": versions(), "commit": commit(), "machine": machine(),
    }  # fmt: skip
    print(f"patched {args.layers} layers in {patching:.1f} s; index {row['index_build_seconds_median']:.2f} s a layer")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Pre-train the base model of the quick start, an OPT of at most 8 million parameters.

    python -m scripts.pretrain.tokens CORPUS.parquet build/corpus.npz
    python -m scripts.pretrain build/corpus.npz build/base                        # goes on until it is told to end
    python -m scripts.pretrain build/corpus.npz build/base --tokens 120e6         # ends after 120 million tokens

Muon trains the hidden matrices, AdamW the rest. The learning rate warms up, stays, and falls to zero over the last part
of the budget, in which windows are longer (warm-up-stable-decay; Hu et al. 2024, MiniCPM).

The run may be killed at any moment: the same command goes on from its last checkpoint, with the data that would have
come next. `stable.pt` is the last checkpoint before the learning rate falls. A larger budget goes on from there, so a
finished run can be made longer. `build/base/model` is the model that a finished budget leaves.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from shutil import which

import torch
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from scripts.pretrain.corpus import EOS, Corpus
from scripts.pretrain.schedule import Budget
from scripts.pretrain.trainer import Trainer

LARGEST = 8_000_000
TOKENIZER = Path(__file__).parents[2] / "rayrlhf" / "assets" / "opt-tiny"


def make_model(layers: int, hidden: int, heads: int, positions: int, seed: int) -> PreTrainedModel:
    """A new OPT with tied embeddings, for the embedded tokenizer of 8,192 tokens."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=8192, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=positions, bos_token_id=EOS, eos_token_id=EOS,
        pad_token_id=1, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    # Either instruction set multiplies bfloat16 faster than float32; other CPUs do it more slowly.
    facts = Path("/proc/cpuinfo")  # of Linux
    processor = facts.read_text(encoding="utf-8").split() if facts.exists() else []
    has_bfloat16 = torch.cuda.is_available() or not {"amx_bf16", "avx512_bf16"}.isdisjoint(processor)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("corpus", type=Path, help="what scripts.pretrain.tokens wrote")
    add("output", type=Path, help="the directory of checkpoints, log and model")
    add("--tokens", type=float, help="end after so many tokens of training")
    add("--minutes", type=float, help="end after so many minutes of training")
    add("--decay", type=float, default=0.25, help="the last share of the budget (default: %(default)s)")
    add("--init", type=Path, help="start from this model, in its shape")
    add("--layers", type=int, default=6)
    add("--hidden", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--window", type=int, default=512, help="tokens (default: %(default)s)")
    add("--last-window", type=int, default=768, help="while the learning rate falls (default: %(default)s)")
    add("--batch-tokens", type=int, default=16384, help="of a step (default: %(default)s)")
    add("--micro-batch-tokens", type=int, default=4096, help="of a forward pass (default: %(default)s)")
    add("--lr", type=float, default=4e-3, help="the highest learning rate (default: %(default)s)")
    add("--warmup", type=int, default=100, help="steps (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--held-out", type=int, default=500, help="posts that measure the loss (default: %(default)s)")
    add("--evaluate-every", type=float, default=2e6, help="tokens (default: %(default)s)")
    add("--save-minutes", type=float, default=5.0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bfloat16", action=argparse.BooleanOptionalAction, default=has_bfloat16,
        help="products in bfloat16; default: where the hardware is faster at them")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, default=bool(torch.cuda.is_available() or which("g++")),
        help="with torch.compile; default: with a GPU, or with g++, which compiles for the CPU")  # fmt: skip
    add("--tokenizer", type=Path, default=TOKENIZER, help="copied beside the model")
    found = parser.parse_args(arguments)
    if found.tokens and found.minutes:
        parser.error("--tokens and --minutes are two budgets; name one")
    return found


def main() -> None:
    arguments = parse()
    budget = (
        Budget("seconds", 60 * arguments.minutes, arguments.decay)
        if arguments.minutes
        else Budget("tokens", arguments.tokens or math.inf, arguments.decay)
    )
    corpus, held_out = Corpus.read(arguments.corpus).split(arguments.held_out)
    if arguments.init:
        model = AutoModelForCausalLM.from_pretrained(arguments.init, dtype=torch.float32)
    else:
        positions = max(arguments.window, arguments.last_window)
        model = make_model(arguments.layers, arguments.hidden, arguments.heads, positions, arguments.seed)
    parameters = sum(each.numel() for each in model.parameters())
    if parameters > LARGEST:
        raise SystemExit(f"{parameters:,} parameters; at most {LARGEST:,}, so that the quick start is quick")
    print(f"{parameters:,} parameters; {len(corpus.starts) - 1:,} posts to train on", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(model.to(arguments.device).train(), corpus, arguments.output, arguments)
    trainer.load(budget)
    if trainer.train(budget, held_out):
        loss = trainer.evaluate(held_out)
        trainer.export(arguments.output / "model")
        print(f"{loss:.4f} nats a token on {arguments.held_out} posts: {arguments.output / 'model'}")


if __name__ == "__main__":
    main()

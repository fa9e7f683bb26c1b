"""Cross-validated accuracy of reward models on a file of human pairs, as Markdown.

    python scripts/hh_reward_model.py PAIRS.jsonl.gz [--folds 5] [--runs-dir DIR] [--local] [key.sub=value ...]

Every fold fine-tunes on the preferred replies of the other folds and trains a reward model on their pairs with the
ordinary commands, then all held-out pairs are pooled. Dialogues with the same opening lie in the same fold. Finished
folds are not run again. To try settings on a training part alone, run one fold of it, with folds of another seed:
`python scripts/hh_reward_model.py DIR/fold-1/train.jsonl --only 1 --folds-seed 1 --runs-dir OTHER key.sub=value`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrlhf.config_file import load_config
from rayrlhf.data.comparisons import from_comparisons
from rayrlhf.data.loading import read_file
from rayrlhf.data.sources import DataSet, Rendering
from rayrlhf.data.splits import hash_fraction
from rayrlhf.files import replacing
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.reports.measures import SCORERS
from rayrlhf.reports.reward_accuracy import accuracies

CONFIG = Path("configs/hh_harmless_tiny.yaml")


def write_folds(data: Path, folds: int, seed: int, directory: Path) -> None:
    """`fold-K/train.jsonl` and `fold-K/validation.jsonl` for K = 1 .. folds; ids are `OPENING:LINE`.

    A pair's fold follows from a hash of `seed` and its dialogue's first turn: no dialogue is on both sides.
    """
    lines: list[tuple[int, str]] = []
    for number, row in enumerate(read_file(data), start=1):
        opening = hash_fraction(row.text("chosen").strip().split("\n\nAssistant:")[0], f"folds-{seed}")
        pair = {"id": f"{opening:.12f}:{number}", "chosen": row.text("chosen"), "rejected": row.text("rejected")}
        lines.append((int(opening * folds), json.dumps(pair) + "\n"))
    for k in range(folds):
        for name, heldout in (("train", False), ("validation", True)):
            with replacing(directory / f"fold-{k + 1}" / f"{name}.jsonl") as temporary:
                temporary.write_text("".join(line for fold, line in lines if (fold == k) is heldout))


def run_fold(fold: Path, options: Sequence[str]) -> pa.Table:
    """SFT and reward model on the fold's training part; returns its held-out pairs."""
    own = [
        f"runs_dir={fold.parent.resolve()}",
        f"name={fold.name}-run",
        f"data.demonstrations.path={fold / 'train.jsonl'}",
        f"data.comparisons.path={fold}",
    ]
    for stage in ("sft", "reward-model"):
        command = [sys.executable, "-m", "jobs.cli", stage, str(CONFIG), *own, *options]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(f"{fold.name}: stage {stage} failed")
    return pq.read_table(fold.parent / f"{fold.name}-run" / "heldout_pairs.parquet")


def pooled_table(tables: Sequence[pa.Table]) -> list[str]:
    """Accuracy of each scorer over all pairs, intervals over dialogues; and the reward model's by fold."""
    pooled = pa.concat_tables(tables)
    dialogues = [id.split(":")[0] for id in pooled.column("id").to_pylist()]
    found = accuracies(pooled, dialogues)

    def cell(value: dict[str, float] | None) -> str:
        return "–" if value is None else f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    lines = [f"{pooled.num_rows} held-out pairs of {len(set(dialogues))} dialogues, {len(tables)} folds.", ""]
    lines += ["| ordered by | accuracy | reward model minus it, paired | ties |", "|---|---|---|---|"]
    for name, words in SCORERS.items():
        difference = cell(found["reward_model_minus"].get(name))
        lines.append(f"| {words} | {cell(found['accuracy'][name])} | {difference} | {found['ties'][name]} |")
    by_fold = [accuracies(t, t.column("id").to_pylist())["accuracy"]["reward_model"]["mean"] for t in tables]
    return [*lines, "", "Reward model by fold: " + ", ".join(f"{accuracy:.3f}" for accuracy in by_fold) + "."]


def usage_of(data: Path, overrides: Sequence[str]) -> str:
    """What became of the pairs of the file: used, dropped and why, cut."""
    config = load_config(CONFIG, [*overrides, f"data.comparisons.path={data}"])
    sources, limits = config.data.comparisons, config.data
    assert sources is not None
    tokenizer = load_tokenizer(resolve_model(config.model.path), config.model.revision)
    found = DataSet(sources, Rendering(tokenizer, 10**6), "comparison").comparisons("all")
    whole, dropped = found.records, found.dropped
    fitted = DataSet(sources, Rendering(tokenizer, limits.max_prompt_tokens), "comparison").comparisons("all").records
    answers = [len(ids) for c in from_comparisons(whole, 10**6) for ids in c.response_ids]
    used = len(from_comparisons(fitted, limits.max_response_tokens))
    reasons = Counter(dropped) + Counter(equal_after_cutting=len(fitted) - used)
    total = used + reasons.total()
    shortened = np.mean([a.prompt != b.prompt for a, b in zip(whole, fitted, strict=True)])
    cut = np.mean(np.array(answers) > limits.max_response_tokens)
    words = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return (
        f"{total} pairs in the file, {used} used, {reasons.total()} ({reasons.total() / total:.1%}) dropped: {words}. "
        f"{shortened:.0%} of the dialogues lost oldest turns or text, {cut:.0%} of the replies were cut."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a file of HH-RLHF pairs: `chosen` and `rejected` dialogues")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--folds-seed", type=int, default=0, help="another way to cut into folds")
    parser.add_argument("--only", type=int, help="run this fold alone")
    parser.add_argument("--local", action="store_true", help="every stage in one process, without Ray")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/hh-harmless"))
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    arguments = parser.parse_intermixed_args()
    write_folds(arguments.data, arguments.folds, arguments.folds_seed, arguments.runs_dir)
    options = [*arguments.overrides, *(["--local"] if arguments.local else [])]
    chosen = [arguments.only] if arguments.only else range(1, arguments.folds + 1)
    tables = [run_fold(arguments.runs_dir / f"fold-{k}", options) for k in chosen]
    print("\n".join([*pooled_table(tables), "", usage_of(arguments.data, arguments.overrides)]))


if __name__ == "__main__":
    main()

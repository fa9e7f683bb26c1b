"""Write a small task whose answers a rule can check: which of two numbers is larger, or what is their sum.

    python scripts/make_arithmetic.py build/arithmetic.jsonl
    rayrlhf run configs/arithmetic.yaml

Each row has a prompt and its answer: "17 or 25, the larger is" and "25", or with --task sum "17 + 25 =" and "42". Every
pair of numbers below 50 is there once, in an order that a seed decides.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

LIMIT = 50
TASKS = {
    "larger": lambda a, b: (f"{a} or {b}, the larger is", str(max(a, b))),
    "sum": lambda a, b: (f"{a} + {b} =", str(a + b)),
}


def rows(task: str, seed: int) -> list[dict[str, str]]:
    """All pairs of different numbers, shuffled."""
    pairs = [(a, b) for a in range(LIMIT) for b in range(LIMIT) if a != b]
    random.Random(seed).shuffle(pairs)
    texts = [(f"{a}, {b}", *TASKS[task](a, b)) for a, b in pairs]
    return [{"id": name, "prompt": prompt, "response": answer} for name, prompt, answer in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the JSON lines file that is written")
    parser.add_argument("--task", choices=TASKS, default="larger", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    arguments = parser.parse_args()
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    found = rows(arguments.task, arguments.seed)
    arguments.path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    print(f"{len(found)} rows: {arguments.path}")


if __name__ == "__main__":
    main()

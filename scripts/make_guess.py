"""Write the prompts of a guessing game: a number, which the policy is to find by asking.

    python scripts/make_guess.py build/guess.jsonl
    rayrlhf run configs/guess.yaml

A row's response is the number to find, which `rayrlhf.environments.guess` is told as the reference. Half of the prompts
begin a game, and half come after one guess, with its answer. SFT so learns to guess any number that may be the right
one, all with the same probability; a strategy is left to RL. The game's count only makes the prompts differ.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

HIGHEST = 7
ROWS = 2000


def rows(seed: int) -> list[dict[str, str]]:
    """Prompts and numbers."""
    draw, found = random.Random(seed), []
    for i in range(ROWS):
        number, guess = draw.sample(range(1, HIGHEST + 1), 2)
        prompt = f"Game {i}: a number from 1 to {HIGHEST}. Guess:"
        if i % 2:
            prompt += f" {guess} {'Higher' if number > guess else 'Lower'}. Guess:"
        found.append({"id": str(i), "prompt": prompt, "response": str(number)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the JSON lines file that is written")
    parser.add_argument("--seed", type=int, default=0, help="of the numbers (default: 0)")
    arguments = parser.parse_args()
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    found = rows(arguments.seed)
    arguments.path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    print(f"{len(found)} rows: {arguments.path}")


if __name__ == "__main__":
    main()

"""Turn a corpus of posts into the token ids that `scripts.pretrain` reads.

    python -m scripts.pretrain.tokens CORPUS.parquet build/corpus.npz

The corpus has the columns `id`, `subreddit`, `title` and `post`. A share of the posts has its title at the end: naming
what a text is about is what a TL;DR asks for. Posts of the embedded TL;DR data are left out, by their id and by their
first words; so are repeats.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from rayrlhf.files import replacing

ASSETS = Path(__file__).parents[2] / "rayrlhf" / "assets"
OPENING = 30
"""Two posts whose first so many words are equal are one post."""


def opening(post: str) -> str:
    """What tells a post from others, whatever its id: a crosspost has another, and an edit follows at the end."""
    return " ".join(post.lower().split()[:OPENING])


def embedded_posts() -> list[dict[str, Any]]:
    """The posts that the package ships, of both splits."""
    return [row for part in ("train", "valid") for row in pq.read_table(ASSETS / f"tldr/{part}.parquet").to_pylist()]


def kept(rows: Iterable[dict[str, Any]], known: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows that are neither among `known` nor repeats, and how many were left out for which reason."""
    ids, openings = {row["id"] for row in known}, {opening(row["post"]) for row in known}
    seen, left, found = set(ids), Counter[str](), []
    for row in rows:
        start = opening(row["post"])
        if row["id"] in ids or start in openings:
            left["of the TL;DR data"] += 1
        elif row["id"] in seen or start in seen:
            left["repeats"] += 1
        else:
            seen |= {row["id"], start}
            found.append(row)
    return found, left


def render(row: dict[str, Any], title_last: bool) -> str:
    """The text of one post.

    >>> render({"subreddit": "tea", "title": "Green", "post": "Or black?"}, title_last=True)
    'SUBREDDIT: r/tea\\n\\nPOST: Or black?\\n\\nTITLE: Green'
    """
    parts = [f"TITLE: {row['title']}", f"POST: {row['post']}"]
    return "\n\n".join([f"SUBREDDIT: r/{row['subreddit']}", *(reversed(parts) if title_last else parts)])


def texts(rows: Sequence[dict[str, Any]], title_last: float, seed: int) -> Iterator[str]:
    """The text of each row; of a share `title_last` of them, chosen by the seed, the title stands at the end."""
    chance = random.Random(f"title-{seed}")
    for row in rows:
        yield render(row, chance.random() < title_last)


def batched(found: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` texts, the last one shorter."""
    while batch := list(itertools.islice(found, size)):
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a parquet file with the columns id, subreddit, title, post")
    parser.add_argument("output", type=Path, help="the .npz file that is written")
    parser.add_argument("--tokenizer", type=Path, default=ASSETS / "opt-tiny", help="a directory with tokenizer.json")
    parser.add_argument("--title-last", type=float, default=0.35, help="share of the posts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of that share (default: 0)")
    arguments = parser.parse_args()

    rows, left = kept(pq.read_table(arguments.corpus).to_pylist(), embedded_posts())
    random.Random(f"order-{arguments.seed}").shuffle(rows)
    for reason, count in left.items():
        print(f"left out: {count:,} posts, {reason}")

    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    tokenizer.no_truncation()
    if tokenizer.get_vocab_size() > 2**16:
        parser.error(f"{arguments.tokenizer}: more than 65,536 tokens; ids are kept in 16 bits")
    ids, done = [], 0
    for batch in batched(texts(rows, arguments.title_last, arguments.seed), 4096):
        ids += [np.array(each.ids, np.uint16) for each in tokenizer.encode_batch(batch, add_special_tokens=False)]
        done += len(batch)
        print(f"\r{done:,} of {len(rows):,} posts", end="", flush=True)
    starts = np.cumsum([0, *map(len, ids)])
    with replacing(arguments.output) as temporary, temporary.open("wb") as file:
        np.savez(file, ids=np.concatenate(ids), starts=starts)
    print(f"\n{len(rows):,} posts, {starts[-1]:,} tokens: {arguments.output}")


if __name__ == "__main__":
    main()

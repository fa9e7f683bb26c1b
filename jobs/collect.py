"""Stage `collect`: answers from the SFT model, ranked by a labeller, written to `comparisons.parquet`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jobs.console import console
from jobs.session import Session
from jobs.stage import main, stage
from rayrlhf.config import Config
from rayrlhf.data.comparisons import RankedAnswers, rank_answers, usable_answers, write_comparisons
from rayrlhf.data.records import Demonstration, Prompt
from rayrlhf.data.splits import is_heldout
from rayrlhf.data.tokens import decode_response, encode_response
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.rewards.labellers import Unranked, ask_people, make_labeller, rankings_path, read_unranked
from rayrlhf.trajectory import derive_seed


@stage("collect")
def collect(session: Session) -> None:
    """Sample K answers to each prompt of the reward-model split and have the labeller rank them."""
    config, run = session.config, session.run
    records = chosen_prompts(config, session.data.collect)
    to_rank = run.path / "to_rank.jsonl"
    section = config.collect.labeller
    people = section if section.kind == "file" else None
    if people and to_rank.is_file():
        answers = read_unranked(to_rank)  # people rank these answers: sampling again would give them others
        console.print(f"collect: the answers of {to_rank} are used again (delete it to have others sampled)")
    else:
        answers, dropped = sample_answers(session, records)
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "none"
        console.print(
            f"collect: {sum(len(a.answers) for a in answers)} answers to {len(answers)} prompts; dropped: {counts}"
        )
    if not answers:
        raise UserError(
            "collect: no prompt got two different answers of at least 5 words; "
            "train SFT longer or raise collect.temperature"
        )
    if people and not rankings_path(people).is_file():
        request = ask_people(to_rank, answers, people)
        run.upload(to_rank)
        raise request

    labeller = make_labeller(section)
    prompts: dict[str, Prompt] = {p.id: p for p in session.data.collect}
    labeller.prepare([(prompts[a.id], a.answers) for a in answers])
    ranked = []
    for answer in answers:
        verdict = labeller.rank(prompts[answer.id], answer.answers)
        ranked.append(
            rank_answers(
                id=answer.id,
                prompt=answer.prompt,
                prompt_ids=answer.prompt_ids,
                responses=answer.answers,
                response_ids=answer.answer_ids,
                order=verdict.order,
                scores=verdict.scores,
                labeller=labeller.name,
                heldout=is_heldout(answer.id, config.collect.heldout_fraction),
            )
        )
    if facts := labeller.facts():
        with replacing(run.labeller) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        run.upload(run.labeller)
        console.print(f"collect: {labeller.name}: {', '.join(f'{name} {value}' for name, value in facts.items())}")
    if not any(each.pairs and not each.heldout for each in ranked):
        raise UserError(
            f"collect: nothing to learn from: {labeller.name!r} ranked all answers to {len(ranked)} prompts alike, or "
            "only held-out prompts have a preference; raise collect.prompts or collect.temperature, train SFT longer, "
            "or choose another collect.labeller"
        )
    with run.writing("collect") as path:
        write_comparisons(path, ranked)
    console.print(summary(ranked))


def chosen_prompts(config: Config, records: Sequence[Demonstration]) -> list[Demonstration]:
    """A seeded choice of `collect.prompts` of the split (all of them if there are fewer)."""
    order = np.random.default_rng(derive_seed(config.seed, "collect")).permutation(len(records))
    return [records[i] for i in sorted(order[: config.collect.prompts])]


def sample_answers(session: Session, records: list[Demonstration]) -> tuple[list[Unranked], Counter[str]]:
    """K samples a prompt from the SFT model, without nearly empty and repeated ones, and counts of those."""
    config, tokenizer = session.config, session.tokenizer
    version = session.rollouts.load_weights(session.starts.of("collect"))
    count = config.collect.answers_per_prompt
    trajectories = session.rollouts.generate(
        session.data.prompts(records), config.collect, version, "collect", samples=count
    )
    dropped: Counter[str] = Counter()
    unranked = []
    for i, record in enumerate(records):
        own = trajectories[i * count : (i + 1) * count]
        texts = [decode_response(tokenizer, t.response_ids.tolist()) for t in own]
        ids = [tuple(t.response_ids.tolist()) for t in own]
        if config.collect.include_reference:
            texts.append(record.response)
            ids.append(
                tuple(encode_response(tokenizer, record.response, config.data.max_response_tokens, record.prompt))
            )
        kept, reasons = usable_answers(texts)
        dropped += reasons
        if len(kept) < 2:
            dropped["alone"] += len(kept)
            continue
        prompt_ids = tuple(own[0].prompt_ids.tolist())
        unranked.append(
            Unranked(record.id, record.prompt, tuple(texts[j] for j in kept), prompt_ids, tuple(ids[j] for j in kept))
        )
    return unranked, dropped


def summary(ranked: list[RankedAnswers]) -> str:
    """What was collected, in one line."""
    pairs = sum(len(r.pairs) for r in ranked)
    heldout = sum(r.heldout for r in ranked)
    return (
        f"collect: {len(ranked)} prompts, {pairs} pairs, {heldout} prompts held out, ranked by {ranked[0].labeller!r}"
    )


if __name__ == "__main__":
    main(collect)

"""Stage `collect`: answers from the SFT model or other ones, ranked by a labeller, in `comparisons.parquet`."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jobs.console import console
from jobs.session import Session
from jobs.stage import main, stage
from rayrlhf.config import Config
from rayrlhf.data.comparisons import RankedAnswers, rank_answers, usable_answers, write_comparisons
from rayrlhf.data.prompts import whose_turn
from rayrlhf.data.records import Demonstration, Prompt
from rayrlhf.data.splits import is_heldout
from rayrlhf.data.tokens import decode_response, encode_response
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.rewards.gold import gold_measures
from rayrlhf.rewards.labeller import Labeller
from rayrlhf.rewards.labellers import Unranked, make_labeller, read_unranked, write_unranked
from rayrlhf.rewards.margins import closest_first, margin
from rayrlhf.trajectory import Trajectory, derive_seed


@stage("collect")
def collect(session: Session) -> None:
    """Sample K answers to each prompt of the reward-model split and have the labeller rank them."""
    config, run = session.config, session.run
    records = chosen_prompts(config, session.data.collect)
    if config.collect.skip_prompts:
        fresh = min(max(len(session.data.collect) - config.collect.skip_prompts, 0), len(records))
        console.print(f"collect: {len(records)} prompts, {fresh} of them for the first time in these rounds")
    labeller = make_labeller(config.collect.labeller, session.vocabulary)
    answers = unranked_answers(session, records, again=labeller.asks_people)
    if labeller.asks_people:
        session.rest()
    ranked = ranked_answers(session, labeller, answers)
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


def unranked_answers(session: Session, records: list[Demonstration], *, again: bool) -> list[Unranked]:
    """The answers to rank: sampled now, or those of an earlier call.

    Args:
        records: whose prompts are answered.
        again: whether they are kept in `to_rank.jsonl` and taken from there. People rank them for days, and other
            answers would make their rankings void.

    Raises:
        UserError: no prompt has two different answers, or the earlier ones are to other prompts than there are now.
    """
    run = session.run
    if again and run.to_rank.is_file():
        console.print(f"collect: the answers of {run.to_rank} are used again (delete it to have others sampled)")
        answers = read_unranked(run.to_rank)
        prompts = prompts_of(session, answers)
        if strange := [a.id for a in answers if a.id not in prompts or prompts[a.id].text != a.prompt]:
            raise UserError(
                f"{run.to_rank}: {len(strange)} of {len(answers)} prompts, first {strange[0]!r}, are not in the data "
                f"any more; put the data back, or delete the file, and {run.labels.name} with it, to sample others"
            )
        return answers
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
    if model := session.starts.given.get("collect.margin_from"):
        answers = least_sure_first(session, model, answers)
    if again:
        write_unranked(run.to_rank, answers)
        run.upload(run.to_rank)
    return answers


def least_sure_first(session: Session, model: str, answers: list[Unranked]) -> list[Unranked]:
    """The answers of all prompts, those first on whose best two the reward model is least sure: so people are asked."""
    session.rollouts.start_scorers([], session.starts.base, gold=None, reward_model=model)
    given = [
        Trajectory.given(each.id, index, each.prompt_ids, ids)
        for each in answers
        for index, ids in enumerate(each.answer_ids)
    ]
    scored = iter(session.rollouts.score(given, session.config.collect.temperature))
    (reward,) = (each for each in session.config.rewards if each.trained)
    scores = [[next(scored).rewards[reward.name] / reward.weight for _ in each.answers] for each in answers]
    margins = sorted(map(margin, scores))
    console.print(
        f"collect: prompts are asked by the margin of the best two answers in {model}, the closest first: "
        f"{margins[0]:.3g} to {margins[-1]:.3g}, median {statistics.median(margins):.3g}",
        soft_wrap=True,
    )
    return [answers[place] for place in closest_first(scores)]


def ranked_answers(session: Session, labeller: Labeller, answers: list[Unranked]) -> list[RankedAnswers]:
    """The answers in the labeller's order; prompts that it does not rank are left out and counted on the screen."""
    config = session.config
    prompts = prompts_of(session, answers)
    labeller.prepare([(prompts[a.id], a.answers) for a in answers], session.run)
    verdicts = [(answer, labeller.rank(prompts[answer.id], answer.answers)) for answer in answers]
    if unknown := sum(verdict.unknown for _, verdict in verdicts):
        console.print(f"collect: {unknown} of {len(verdicts)} prompts have no ranking and are left out")
    gold = None if config.collect.labeller.measures else session.gold
    return [
        rank_answers(
            id=answer.id,
            prompt=answer.prompt,
            prompt_ids=answer.prompt_ids,
            responses=answer.answers,
            response_ids=answer.answer_ids,
            order=verdict.order,
            scores=verdict.scores,
            gold=gold_measures(gold, [prompts[answer.id]] * len(answer.answers), answer.answers),
            labeller=labeller.name,
            heldout=is_heldout(answer.id, config.collect.heldout_fraction),
        )
        for answer, verdict in verdicts
        if not verdict.unknown
    ]


def prompts_of(session: Session, answers: Sequence[Unranked]) -> dict[str, Prompt]:
    """The prompts of the data that are answered, by their ids."""
    answered = {answer.id for answer in answers}
    return {prompt.id: prompt for prompt in session.data.collect if prompt.id in answered}


def chosen_prompts(config: Config, records: Sequence[Demonstration]) -> list[Demonstration]:
    """A seeded choice of `collect.prompts` of the split (all of them if there are fewer).

    Rounds take one piece of the same order after the other, and begin again at its end.
    """
    order = np.random.default_rng(derive_seed(config.seed, "collect")).permutation(len(records))
    order = np.roll(order, -config.collect.skip_prompts)
    return [records[i] for i in sorted(order[: config.collect.prompts])]


def sample_answers(session: Session, records: list[Demonstration]) -> tuple[list[Unranked], Counter[str]]:
    """K samples a prompt, without nearly empty and repeated ones, and counts of those."""
    config, tokenizer = session.config, session.tokenizer
    count = config.collect.answers_per_prompt
    trajectories = draw_answers(session, records)
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


def draw_answers(session: Session, records: list[Demonstration]) -> list[Trajectory]:
    """K samples of each prompt behind one another, shared out to the models that answer."""
    config, models = session.config, session.starts.answering
    count = config.collect.answers_per_prompt
    prompts = session.data.prompts(records)
    turns = whose_turn([share for _, share in models], len(records) * count)
    drawn: dict[int, Trajectory] = {}
    for number, (model, _) in enumerate(models):
        own = [place for place, turn in enumerate(turns) if turn == number]
        version = session.rollouts.load_weights(model)
        # Of equal seeds, models that are alike would draw equal answers.
        seed = ("collect", number) if number else ("collect",)
        answers = session.rollouts.generate([prompts[place // count] for place in own], config.collect, version, *seed)
        drawn |= zip(own, answers, strict=True)
        if config.collect.models:
            console.print(f"collect: {len(own)} answers of {model}", soft_wrap=True)
    return [drawn[place] for place in range(len(turns))]


def summary(ranked: list[RankedAnswers]) -> str:
    """What was collected, in one line."""
    pairs = sum(len(r.pairs) for r in ranked)
    heldout = sum(r.heldout for r in ranked)
    return (
        f"collect: {len(ranked)} prompts, {pairs} pairs, {heldout} prompts held out, ranked by {ranked[0].labeller!r}"
    )


if __name__ == "__main__":
    main(collect)

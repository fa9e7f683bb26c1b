"""Stage `reward_model`: learn preferences. `ray job submit ... -- python -m jobs.reward_model --config FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.pools.remote import put
from actors.training.reward_model import RewardModelArguments, reward_model_loop
from jobs.console import console, warn_of_stage
from jobs.session import Session
from jobs.stage import main, stage
from rayrlhf.data.comparisons import Answers, RankedAnswers, of_run, read_ranked
from rayrlhf.data.rows import Row
from rayrlhf.reports.results import read_accuracy
from rayrlhf.reports.reward_accuracy import unbeaten
from rayrlhf.reports.tables import reward_accuracy_table
from rayrlhf.runs.addresses import folder_name
from rayrlhf.runs.storage import local_copy

MAX_REFERENCES = 1000
"""Enough for a mean; scoring all of a large data set would take longer than training."""


@stage("reward_model")
def reward_model(session: Session) -> None:
    """Train a scalar head on the SFT model with the collected comparisons, or with those of `data.comparisons`."""
    session.warm_up(generators=False)
    comparisons = collected_or_published(session, session.config.reward_model.max_comparisons)
    # References set the score's zero: people's own answers, to prompts of this stage's split where it has some.
    records = (session.data.train.reward_model or session.data.train.sft)[:MAX_REFERENCES]
    references = [
        Row.completion(prompt.ids, response)
        for prompt, response in zip(session.data.prompts(records), session.data.responses(records), strict=True)
    ]
    arguments = RewardModelArguments(
        **session.loop_arguments("reward_model"),
        model=session.starts.of("reward_model"),
        comparisons=put(comparisons, session.local),
        references=put(references, session.local),
        sft=session.starts.sft,
    )
    session.train("reward_model", reward_model_loop, arguments)
    session.run.download_files()
    if session.run.reward_accuracy.exists():
        result = read_accuracy(session.run)
        assert result is not None, "it is there, see above"
        console.print(reward_accuracy_table(result))
        if unbeaten(result):
            warn_of_stage(
                session.run,
                "reward_model",
                f"the reward model is not clearly better than: {', '.join(unbeaten(result))}; rl against it may find "
                "nothing. More or cleaner comparisons help, or a larger model",
            )


def collected_or_published(session: Session, limit: int | None) -> list[Answers]:
    """What `data.comparisons` has (its validation split held out), else the comparisons of the `collect` stage, and
    those of `collect.earlier` behind them.

    With `limit`, the first so many to train on; all that are held out stay.
    """
    given = session.config.data.comparisons is not None
    found: Sequence[Answers] = session.data.comparisons if given else _collected(session)
    train, heldout = ([c for c in found if c.heldout is kept] for kept in (False, True))
    return train[:limit] + heldout


def _collected(session: Session) -> list[RankedAnswers]:
    own, earlier = read_ranked(session.run.comparisons), session.config.collect.earlier
    if not earlier:
        return own
    found = of_run(own, session.config.name)
    for each in earlier:
        there = read_ranked(Path(local_copy(each.path)))
        kept = of_run(there, folder_name(each.path), each.weight)
        learnt = sum(not c.heldout for c in kept)
        unused = len(there) - len(kept)
        console.print(
            f"{each.path}: {learnt} prompts to learn from with weight {each.weight:g}, {len(kept) - learnt} held out"
            + (f"; {unused} are unused, since their weight is 0" if unused else ""),
            soft_wrap=True,
        )
        found += kept
    return found


if __name__ == "__main__":
    main(reward_model)

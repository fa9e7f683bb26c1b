"""A labeller that waits for people, who rank the answers on the page of `rayrlhf label RUN`.

The page and the stage `collect` are two commands that share the database of the run's labels. So people may begin,
stop and go on whenever they like, and so may the run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence

from rayrlhf.config_labellers import PeopleLabellerConfig
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.labelling.agreement import agreement
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.labelling.wanted import Progress, Wanted
from rayrlhf.rewards.labeller import LabelledRanking, Labeller
from rayrlhf.runs.addresses import as_typed
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.labels import Newest, offer_labels
from rayrlhf.terminal import say

POLL_S = 1.0
"""How often a wait looks whether there is something new."""
SAID_S = 60.0
"""How often a wait says how far people are, where something is new."""


class PeopleLabeller(Labeller):
    """Ranks by the judgements of people.

    Raises:
        UserError: from `prepare`: the database cannot be used, or has other answers; or `wait_s` has passed.
    """

    name = "people"
    asks_people = True

    def __init__(self, config: PeopleLabellerConfig) -> None:
        self._config = config
        self._wanted = Wanted(config.labellers, config.until, settle=config.choose == "disagreement")
        self._scores: Mapping[str, tuple[float, ...]] = {}
        self._facts: dict[str, str | float] = {}

    def prepare(self, waiting: Sequence[tuple[Prompt, Sequence[str]]], run: RunFolder) -> None:
        """Put the answers into the database of the run's labels, and return when people have ranked enough of them."""
        with contextlib.ExitStack() as stack:
            database = stack.enter_context(contextlib.closing(LabelDatabase(run.labels)))
            newest = stack.enter_context(contextlib.closing(Newest(run, database)))
            known = {item.id: (item.priority, item.gold) for item in database.items()}
            items = [Item(p.id, p.text, tuple(texts), *known.get(p.id, ())) for p, texts in waiting]
            database.add_items(items)
            database.remember("overlap", self._config.labellers)
            offer_labels(run, database)
            progress = self._wait(newest, items, run)
            judgements, items = progress.judgements, progress.items
        from rayrlhf.labelling.aggregate import aggregate  # scipy takes time, and actors only hold labellers

        aggregated = aggregate(judgements, self._config.aggregate)
        self._scores = aggregated.scores
        # No names: `rayrlhf label RUN --forget NAME` could not take them out of labeller.json.
        self._facts = facts(judgements, items) | {
            "lowest_reliability": round(min(aggregated.reliability.values(), default=0.0), 4)
        }

    def rank(self, prompt: Prompt, answers: Sequence[str]) -> LabelledRanking:
        scores = self._scores.get(prompt.id)
        return LabelledRanking.none(len(answers)) if scores is None else LabelledRanking.by(scores)

    def measure(self, prompt: Prompt, answer: str) -> float | None:
        return None

    def facts(self) -> Mapping[str, str | float]:
        return self._facts

    def _wait(self, newest: Newest, items: Sequence[Item], run: RunFolder) -> Progress:
        """The judgements of the items, once there are enough.

        Raises:
            UserError: `wait_s` has passed.
        """
        newest.changed()
        progress = self._progress(newest, items)
        shown, said, begun = progress.done, time.monotonic(), time.monotonic()
        page = f"`rayrlhf label {as_typed(run.address)}`"
        if not self._wanted.enough(progress.done, len(items)):
            where = "on a machine that reaches the store" if run.store else "on this machine"
            say(
                f"collect: {progress.done} of {len(items)} prompts are ranked; {page} {where} opens the page for "
                f"people. The run goes on by itself when {self._config.until:.0%} of the prompts have the judgements "
                f"of {self._config.labellers} labeller(s). It may be interrupted: the same command waits again",
            )
        while not self._wanted.enough(progress.done, len(items)):
            if self._config.wait_s is not None and time.monotonic() - begun >= self._config.wait_s:
                raise UserError(
                    f"collect: {progress.done} of {len(items)} prompts are ranked, and collect.labeller.wait_s = "
                    f"{self._config.wait_s:g} s have passed; let people go on with {page} and call the same command "
                    "again, or lower collect.labeller.until"
                )
            time.sleep(POLL_S)
            if newest.changed():
                progress = self._progress(newest, items)
            progress.look()
            if progress.done != shown and time.monotonic() - said >= SAID_S:
                say(f"collect: {progress.done} of {len(items)} prompts are ranked")
                shown, said = progress.done, time.monotonic()
        return progress

    def _progress(self, newest: Newest, items: Sequence[Item]) -> Progress:
        assert newest.database is not None, "this machine has one"
        progress = Progress(newest.database, self._wanted, items)
        progress.look()
        return progress


def facts(judgements: Sequence[Judgement], items: Sequence[Item]) -> dict[str, str | float]:
    """What the labellers were like, in a few numbers; `rayrlhf agreement RUN` has the rest."""
    found = agreement(judgements, items)
    everyone = found.everyone
    counts: dict[str, str | float] = {
        "labellers": len(found.labellers),
        "judgements": everyone.judged,
        "skipped": everyone.skipped,
        **{f"flagged {flag}": count for flag, count in sorted(found.flags.items())},
    }
    measured = {
        "agreement": everyone.with_others,
        "with_self": everyone.with_self,
        "with_gold": everyone.with_gold,
        "earlier_preferred": everyone.earlier_preferred,
        "tau_b": found.tau_b,
        "alpha": found.alpha,
    }
    return counts | {name: round(found.mean, 4) for name, found in measured.items() if found is not None}

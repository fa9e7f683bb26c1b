"""A run in rounds: `rayrlhf run` with the section `rounds`."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text

from jobs.cluster import inside_job
from jobs.console import console
from rayrlhf.config import Config
from rayrlhf.reports.round_measures import RoundResult, read_round, reason_to_stop
from rayrlhf.reports.rounds import rounds_table, write_rounds_report
from rayrlhf.runs.addresses import join, runs_address
from rayrlhf.runs.contents import read_contents
from rayrlhf.runs.folder import RunFolder, open_or_create, stored_contents
from rayrlhf.runs.rounds import asks_as_drawn, note_rounds, round_config, round_name, rounds_of
from rayrlhf.runs.stages import stages_of
from rayrlhf.runs.starts import find_models


def run_rounds(config: Config, run_once: Callable[[Config], None]) -> None:
    """Do the rounds of a config one after the other. Rounds that are finished are skipped, and one under way goes on.

    Args:
        config: it has `rounds`.
        run_once: does all stages of an ordinary run.

    Raises:
        UserError: a key of a finished stage of some round has changed, or what `run_once` raises.
    """
    rounds = config.rounds
    assert rounds is not None
    runs_dir = runs_address(config.runs_dir, inside_job())
    config = config.model_copy(update={"runs_dir": runs_dir})
    run = RunFolder(join(runs_dir, config.name))
    with run.lock():
        run.download_files()
        _check_finished(config, run)
        open_or_create(config, runs_dir)
        results: list[RoundResult] = []
        reason = None
        for number in range(1, rounds.count + 1):
            own, folder = round_config(config, number, run.address), _folder(run, number)
            note_rounds(run, number)
            if not _finished(own, folder):
                if results:  # a round takes hours: until it is done the report has those before it
                    run.upload(write_rounds_report(run, results, None))
                console.rule(Text(f"round {number} of {rounds.count}", style="bold"), align="left")
                if asks_as_drawn(config, number):
                    console.print("collect.labeller.choose=margin: no reward model yet, so this round asks as drawn")
                run_once(own)
            results.append(read_round(folder, number))
            if rounds.stop and number < rounds.count:
                reason = reason_to_stop(results)
            if reason:
                break
        note_rounds(run, len(results), reason)
        run.upload(write_rounds_report(run, results, reason))
        console.print(rounds_table(results))
        if reason:
            console.print(
                f"no further round: {reason}; rounds.stop=false would go on to round {rounds.count}",
                soft_wrap=True,
            )
        console.print(f"rounds: {len(results)} of {rounds.count} done, see {run.address_of(run.report)}")


def _folder(run: RunFolder, number: int) -> RunFolder:
    return RunFolder(join(run.address, round_name(number)))


def _finished(config: Config, folder: RunFolder) -> bool:
    return folder.done(stages_of(config)[-1].name)


def _check_finished(config: Config, run: RunFolder) -> None:
    """
    Raises:
        UserError: a finished round was done with other values or other files than the config has.
    """
    for number, folder in enumerate(rounds_of(run), 1):
        own = round_config(config, number, run.address)
        if _finished(own, folder):
            contents = read_contents(own, find_models(own), stored_contents(folder))
            open_or_create(own, run.address, contents=contents)

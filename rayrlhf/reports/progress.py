"""What a run prints: a table of its batch numbers, one line for each step, samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rayrlhf.config import Config
from rayrlhf.reports.measures import PHASE_S, PHASES, STEP_S, TOKENS_PER_S, measures_in_line
from rayrlhf.runs.stages import STAGES

FEW_STEPS = 20
"""Fewer optimiser steps of a stage hardly change a model."""


@dataclass(frozen=True)
class StageLoad:
    """The work of one stage, as the config implies it. Counts are totals over all workers unless stated otherwise."""

    stage: str
    records: int
    prompts_a_step: int
    samples_a_step: int
    optimiser_steps: int | None
    """None for a stage that trains nothing."""
    micro_batches: int | None
    """Passes of one worker for one optimiser step, if every text has full length; None if the stage trains nothing."""
    tokens_a_step: int
    """Prompt and response tokens a step, at most."""


def stage_loads(
    config: Config,
    n_sft: int,
    n_prompts: int,
    n_comparisons: int | None,
    n_test: int,
    answers: float = 2,
    n_collect: int | None = None,
) -> list[StageLoad]:
    """The load of each stage of a run.

    Args:
        config: the run's config.
        n_sft: demonstrations in the SFT split.
        n_prompts: prompts in the RL split.
        n_comparisons: prompts with ranked or labelled answers; None if the `collect` stage makes them.
        n_test: prompts in the split that is evaluated.
        answers: their mean number to a prompt; of no meaning if the `collect` stage makes them.
        n_collect: prompts that `collect` may ask; None if they are no fewer than the config says.
    """
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    workers = config.resources.learner.workers

    def micro(rows: int, micro_batch_tokens: int) -> int:
        return math.ceil(math.ceil(rows / workers) / max(1, micro_batch_tokens // longest))

    sft, rm, dpo, rl, collect = config.sft, config.reward_model, config.dpo, config.rl, config.collect
    loads = []

    records = min(n_sft, sft.max_demonstrations or n_sft)
    rows = min(sft.batch_size, records)
    steps = sft.epochs * math.ceil(records / sft.batch_size)
    passes = micro(rows, sft.micro_batch_tokens)
    loads.append(StageLoad("sft", records, rows, rows, steps, passes, rows * longest))

    if n_comparisons is None:
        answers = collect.answers_per_prompt + collect.include_reference
        asked = collect.prompts if n_collect is None else min(collect.prompts, n_collect)
        drawn = asked * collect.answers_per_prompt
        loads.append(StageLoad("collect", asked, asked, drawn, None, None, drawn * longest))
        n_comparisons = round(asked * (1 - collect.heldout_fraction))
    for stage, own in (("reward_model", rm), ("dpo", dpo)):
        records = min(n_comparisons, own.max_comparisons or n_comparisons)
        prompts = min(own.prompts_per_batch, records)
        steps = own.epochs * math.ceil(records / own.prompts_per_batch)
        rows = math.ceil(prompts * answers)
        passes = micro(rows, own.micro_batch_tokens)
        loads.append(StageLoad(stage, records, prompts, rows, steps, passes, rows * longest))

    rows = rl.prompts_per_step * rl.samples_per_prompt
    passes = micro(math.ceil(rows / rl.minibatches), rl.micro_batch_tokens)
    steps = rl.steps * rl.epochs * rl.minibatches
    loads.append(StageLoad("rl", n_prompts, rl.prompts_per_step, rows, steps, passes, rows * longest))

    records = min(n_test, config.evaluate.max_prompts or n_test)
    rows = 2 * records  # the SFT model's answers and the policy's
    loads.append(StageLoad("evaluate", records, records, rows, None, None, rows * longest))
    return [load for load in loads if STAGES[load.stage].part_of(config)]


def batch_table(
    config: Config,
    n_sft: int,
    n_prompts: int,
    n_comparisons: int | None = None,
    n_test: int = 0,
    parameters: tuple[int, int] | None = None,
    given: Mapping[str, int] | None = None,
    answers: float = 2,
    n_collect: int | None = None,
) -> Table:
    """A table of the work of each stage; arguments as for `stage_loads`.

    `parameters`, the numbers of the policy's frozen and trained parameters, adds the GiB that the learner's weights,
    gradients and Adam moments take, and the GiB of a scorer's weights. In these are `given`, the bytes of the reward
    models from elsewhere, by name.
    """
    rl = config.rl
    notes = []
    if config.has("dpo"):
        notes.append(f"dpo ({config.dpo.loss}): all answers to a prompt are learnt from together.")
    if config.has("rl"):
        notes.append(
            f"rl ({rl.algorithm}): {rl.steps} steps × {rl.epochs} epochs × {rl.minibatches} mini-batches; "
            f"each step draws {rl.prompts_per_step} prompts × {rl.samples_per_prompt} samples, "
            f"{rl.steps * rl.prompts_per_step * rl.samples_per_prompt:,} samples in all."
        )
    notes.append(
        f"Micro-batches: for one optimiser step, per learner worker (of {config.resources.learner.workers}), "
        "if every text has full length. "
        f"Tokens: at most ({config.data.max_prompt_tokens} prompt + {config.data.max_response_tokens} response)."
    )
    if parameters:
        frozen, trained = parameters
        if frozen:
            notes.append(f"LoRA: of the policy {trained:,} parameters are trained and {frozen:,} are frozen.")
        # A float32 weight is 4 bytes, a trained one with its gradient and two Adam moments 16; for each model.
        models, learner = (2 if rl.critic else 1, "rl") if config.has("rl") else (1, "dpo")
        size = models * (4 * frozen + 16 * trained) / 2**30
        notes.append(f"{learner} learner: about {size:.2f} GiB a worker, without activations.")
        own = 4 * (frozen + trained)
        held = {
            "reference policy": own,
            **({"reward model": own} if config.trains_reward_model else {}),
            **(given or {}),
        }
        notes.append(
            f"scorer: about {sum(held.values()) / 2**30:.2f} GiB each ({', '.join(held)}), without activations."
        )
    loads = stage_loads(config, n_sft, n_prompts, n_comparisons, n_test, answers, n_collect)
    notes += [note for load in loads if (note := _few_steps(load, config))]
    table = Table(title=f"run {config.name}", caption="\n".join(notes), caption_justify="left", title_justify="left")
    table.add_column("stage")
    for heading in (
        "records",
        "prompts\na step",
        "samples\na step",
        "optimiser\nsteps",
        "micro-\nbatches",
        "tokens\na step",
    ):
        table.add_column(heading, justify="right")
    for load in loads:
        numbers = (load.records, load.prompts_a_step, load.samples_a_step, load.optimiser_steps, load.micro_batches)
        table.add_row(load.stage, *("–" if n is None else f"{n:,}" for n in (*numbers, load.tokens_a_step)))
    return table


def _few_steps(load: StageLoad, config: Config) -> str | None:
    """That a model hardly learns in so few optimiser steps, with settings that make more; None if they are enough.

    The defaults are for thousands of records. With a hundred, the model that comes out is nearly the one that went in.
    """
    if load.optimiser_steps is None or load.optimiser_steps >= FEW_STEPS or load.prompts_a_step <= 1:
        return None
    if load.stage == "sft":  # a second pass teaches a reward model its training pairs by heart; SFT gains by it
        epochs, key = max(config.sft.epochs, 3), "batch_size"
    elif load.stage in ("reward_model", "dpo"):
        epochs, key = getattr(config, load.stage).epochs, "prompts_per_batch"
    else:
        return None
    workers = config.resources.learner.workers  # each has an equal part of a batch
    batch = max(workers, load.records * epochs // FEW_STEPS // workers * workers)
    more = f"{load.stage}.epochs={epochs} " if key == "batch_size" else ""
    return (
        f"{load.stage}: {load.records} records make {load.optimiser_steps} optimiser steps, which hardly change a "
        f"model; {more}{load.stage}.{key}={batch} would make {epochs * math.ceil(load.records / batch)}."
    )


def step_line(
    stage: str, step: int, total: int | None, metrics: Mapping[str, float | None], eta_s: float | None = None
) -> str:
    """One line on a finished step: `step` of `total`, the stage's main numbers, seconds by phase, time to go."""
    parts = [f"{stage} {step}" if total is None else f"{stage} {step:>{len(str(total))}}/{total}"]
    parts += [f"{m.words} {m.text(metrics[m.name])}" for m in measures_in_line(stage) if m.name in metrics]
    known = [phase for phase in ("wait", *PHASES) if f"time/{phase}" in metrics]
    if "generate" in known and "wait" in known:
        known.remove("wait")  # generating and scoring are its parts
    phases = [f"{phase} {PHASE_S.text(metrics[f'time/{phase}'])}" for phase in known]
    if (seconds := metrics.get(STEP_S.name)) is not None:
        parts.append(STEP_S.text(seconds) + (f" ({', '.join(phases)})" if phases else ""))
    if TOKENS_PER_S.name in metrics:
        parts.append(TOKENS_PER_S.text(metrics[TOKENS_PER_S.name]))
    if eta_s is not None:
        parts.append(f"ETA {duration(eta_s)}")
    return "  ".join(parts)


def has_step_line(stage: str, metrics: Mapping[str, Any]) -> bool:
    """Whether `step_line` would have more to say than which step it is."""
    return any(measure.name in metrics for measure in measures_in_line(stage))


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Prints one line for each step, with the time to go: in colour on a terminal, plain and unbroken in a log.

    Args:
        stage: a stage's name.
        total: its last step.
        console: where to print.
        done: steps that an earlier process finished.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        console: Console,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.total, self.step = stage, total, done
        self._first, self._clock = done, clock
        self._start = self._last = clock()
        self.console = console

    @property
    def steps_per_s(self) -> float:
        """Mean over the steps of this process; 0 before the first."""
        elapsed = self._last - self._start
        return (self.step - self._first) / elapsed if elapsed > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at that pace; None before the first step."""
        return (self.total - self.step) / self.steps_per_s if self.steps_per_s > 0 else None

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Print the line of a step; `step` counts the finished ones."""
        self.step, self._last = step, self._clock()
        line = Text(step_line(self.stage, step, self.total, metrics, self.eta_s))
        line.highlight_words([self.stage], "bold cyan")
        line.highlight_regex(r"ETA .*", "dim")
        # A log has no width: a wrapped line could not be searched.
        self.console.print(line, soft_wrap=True)


def headline(post: str) -> str:
    """A post in one line: its title, or else its first line."""
    lines = [line.strip() for line in post.splitlines() if line.strip()]
    title = next((line.removeprefix("TITLE:").strip() for line in lines if line.startswith("TITLE:")), None)
    return shortened(title or (lines[0] if lines else "(empty post)"), 110)


def shortened(text: str, longest: int) -> str:
    """A text in one line of at most so many characters; an ellipsis stands for what is left out."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def answers_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two lines for each answer to a dev prompt: the prompt, then the answer with its score and gold.

    Args:
        rows: with `prompt`, `answer`, `score`, `gold` and `weight_version`.
    """
    lines = []
    for row in rows:
        gold = "" if row["gold"] is None else f", gold {row['gold']:.3f}"
        answer = shortened(row["answer"], 200) or "(empty)"
        lines += [headline(row["prompt"]), f"  → {answer} (score {row['score']:.3f}{gold})"]
    return "\n".join(lines)


def in_lines(*parts: str | tuple[str, str]) -> Text:
    """A text, or texts with their styles, that a panel shows whole: in lines, also where the console breaks none."""
    return Text.assemble(*parts, no_wrap=False, overflow="fold")


def sample_panel(prompt: str, reference: str | None, answer: str, title: str = "sample") -> Panel:
    """One prompt with a person's answer and the model's."""
    parts = [in_lines(prompt.strip())]
    for name, text in (("reference", reference), ("answer", answer)):
        if text is not None:
            parts.append(in_lines((f"\n{name}: ", "bold"), text.strip() or "(empty)"))
    return Panel(Group(*parts), title=Text(title), title_align="left")

"""`rayrlhf chat RUN`: models of a run answer what is typed, side by side, in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.answers import Answering
from jobs.console import console
from rayrlhf.data.records import Message
from rayrlhf.data.tokens import encode_prompt
from rayrlhf.data.typed import CHAT
from rayrlhf.errors import UserError
from rayrlhf.models.answering import read_together
from rayrlhf.runs.models import chosen, open_run
from rayrlhf.terminal import say

HELP = """/temp T      draw at temperature T; 0 takes the likeliest token each time
/seed N      of the next answer; each further one has the next
/system TEXT a system prompt from now on; without a text none
/example [N] ask the N-th prompt of the evaluation, or the next; nothing was trained on it
/reset       forget the dialogue
/quit        end, as Ctrl-D does
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""


@dataclass(frozen=True)
class Options:
    """See `rayrlhf chat --help`."""

    models: str | None = None
    template: str | None = None
    system: str | None = None
    temperature: float | None = None
    seed: int = 0
    max_tokens: int | None = None
    score: bool = False


def chat(address: str, options: Options) -> None:
    """Talk until `/quit` or the end of the input.

    Raises:
        UserError: no such run or model, or an option that does not fit.
    """
    run = open_run(address)
    models = chosen(run, options.models)
    with console.status(Text(f"loading {', '.join(models)}")):
        answering = Answering(
            run, models, options.template, options.system, options.max_tokens, options.temperature, options.score
        )
    # Nothing is lost at an end, and Ctrl-C means something else here.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dialogue = Dialogue(answering, options.seed, console)
    dialogue.note(f"{run.name}: {', '.join(models)}. What is typed is {answering.typist.words}. /help lists commands.")
    for typed in lines():
        if not dialogue.take(typed):
            break


class Dialogue:
    """What was said, and how the next answer is drawn. Each model has a dialogue of its own, with its own answers."""

    def __init__(self, answering: Answering, seed: int, out: Console) -> None:
        self.answering, self.seed, self.out = answering, seed, out
        self.temperature = answering.draw.temperature
        self.said: dict[str, list[Message]] = {name: [] for name in answering.models}
        self._example = 0

    def take(self, typed: str) -> bool:
        """Do what was typed; returns whether to go on."""
        word, _, rest = typed.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return False
        command = self._commands.get(word)
        try:
            if command is not None:
                command(rest.strip())
            elif word.startswith("/"):
                raise UserError(f"no command {word}; /help lists them")
            elif word:
                self.ask(typed)
        except UserError as error:  # of one line; the next may be right
            self.note(f"error: {error}")
        return True

    def ask(self, typed: str) -> None:
        """Have all models answer."""
        prompts = {}
        for name, said in self.said.items():
            prompts[name], cut = self.answering.prompt(typed, said)
            if cut:
                self.note(f"{name}: the prompt exceeds the model's context, and lost its oldest or last part")
        texts = self._answer(prompts)
        if self.answering.typist.template == CHAT:
            for name, text in texts.items():
                self.said[name] += [Message("user", typed), Message("assistant", text)]

    def note(self, text: str) -> None:
        """Print a line that no model wrote."""
        self.out.print(Text(text, style="dim"), soft_wrap=True)

    def _answer(self, prompts: Mapping[str, Sequence[int]]) -> dict[str, str]:
        texts = dict.fromkeys(prompts, "")
        answers = self.answering.begin(prompts, self.temperature, self.seed)
        self.seed += 1
        with shown(self.out, texts) as show:
            try:
                read_together(answers, show)
            except KeyboardInterrupt:
                stopped = True
            else:
                stopped = False
            scores = self.answering.scores(answers)
            show.end({name: f"{score:.3f}" for name, score in scores.items()})
        if stopped:
            self.note("stopped")
        return {name: text.strip() for name, text in texts.items()}

    @property
    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/temp": self._set_temperature,
            "/seed": self._set_seed,
            "/system": self._set_system,
            "/example": self._ask_example,
            "/reset": self._forget,
            "/help": lambda rest: self.note(HELP),
        }

    def _set_temperature(self, given: str) -> None:
        with _number("/temp", "a number of 0 or more"):
            value = float(given)
            if not 0 <= value < float("inf"):
                raise ValueError
            self.temperature = value

    def _set_seed(self, given: str) -> None:
        with _number("/seed", "a whole number of 0 or more"):
            value = int(given)
            if value < 0:
                raise ValueError
            self.seed = value

    def _set_system(self, given: str) -> None:
        self.answering.typist.system = given or None
        self._forget()

    def _forget(self, given: str = "") -> None:
        for said in self.said.values():
            said.clear()

    def _ask_example(self, given: str) -> None:
        rows = self.answering.examples
        if not rows:
            raise UserError("the run has no evaluation yet, from which /example takes prompts")
        with _number("/example", f"a number from 1 to {len(rows)}"):
            number = int(given) if given else self._example % len(rows) + 1
            if not 1 <= number <= len(rows):
                raise ValueError
        self._example = number
        row = rows[number - 1]
        self.out.print(Text(row["post"]), soft_wrap=True)
        self._answer(dict.fromkeys(self.said, encode_prompt(self.answering.tokenizer, row["post"])))
        if row["reference"]:
            self.note(f"reference: {row['reference']}")


class Shown:
    """Answers as they grow: columns in a terminal; elsewhere a line each, once they are whole."""

    def __init__(self, out: Console, texts: dict[str, str], live: Live | None) -> None:
        self._out, self._texts, self._live = out, texts, live

    def __call__(self, name: str, piece: str) -> None:
        self._texts[name] += piece
        if self._live:
            self._live.update(columns(self._texts, {}))

    def end(self, scores: Mapping[str, str]) -> None:
        """Show the scores."""
        if self._live:
            self._live.update(columns(self._texts, scores))
            return
        for name, text in self._texts.items():
            head = f"{name} ({scores[name]})" if name in scores else name
            self._out.print(Text(f"{head}: {text.strip()}"), soft_wrap=True)


@contextlib.contextmanager
def shown(out: Console, texts: dict[str, str]) -> Iterator[Shown]:
    """Show answers in the block, as their texts grow."""
    if not out.is_terminal:
        yield Shown(out, texts, None)
        return
    with Live(columns(texts, {}), console=out, refresh_per_second=12, vertical_overflow="visible") as live:
        yield Shown(out, texts, live)


def columns(texts: Mapping[str, str], scores: Mapping[str, str]) -> Table:
    """Answers side by side, each under the name of its model and its score."""
    table = Table(expand=True, show_lines=False)
    for name in texts:
        table.add_column(f"{name}  reward {scores[name]}" if name in scores else name, ratio=1, overflow="fold")
    table.add_row(*(Text(text.strip()) for text in texts.values()))
    return table


def lines() -> Iterator[str]:
    """What is typed, or comes through a pipe: a line each; one that ends with a backslash goes on in the next."""
    begun = ""
    for line in _raw_lines():
        if line.endswith("\\"):
            begun += line[:-1] + "\n"
            continue
        yield begun + line
        begun = ""
    if begun:
        yield begun


def _raw_lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit a line, and remember the lines before it
    while True:
        try:
            yield input("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends")


@contextlib.contextmanager
def _number(command: str, wanted: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise UserError(f"{command} takes {wanted}") from None

"""What the policy answers to dev prompts while `rl` trains it: to look at, to measure, and to choose the best by.

    step         0         1 ...      10         20 ...  steps
    answered by  start                policy of that many updates, as the batch of the next step is
    rl.sample_every   a few answers: terminal, TensorBoard, samples/step_000010.jsonl
    rl.eval_every     many answers: `rl_eval/...` metrics; rl.select keeps the policy that is best by them

Prompts and seeds are the same every time, and are none of the training's, so that nothing of it changes.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.training.loop import Loop
from rayrlhf.config_rl import ROUGE_NAMES
from rayrlhf.data.prompts import EncodedPrompt, requests_for
from rayrlhf.data.records import Prompt
from rayrlhf.data.tokens import decode_trajectory, sampling_of
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.reports.progress import answers_text
from rayrlhf.rewards.diversity import diversity
from rayrlhf.rewards.rouge import rouge
from rayrlhf.rewards.score import score_of
from rayrlhf.sections import DrawConfig
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

Answer = Callable[[Sequence[GenerationRequest], Sampling, int], list[Trajectory]]
"""Scored answers to requests by the weights of a version, which the generators hold."""
BEST = "best"
"""The directory of the best policy inside a checkpoint."""


@dataclass(frozen=True)
class DevPrompt:
    """A prompt to answer, as tokens and as text with its reference."""

    encoded: EncodedPrompt
    prompt: Prompt


@dataclass
class Best:
    """The best evaluation so far; in the checkpoint."""

    value: float = -math.inf
    step: int | None = None
    """Updates of the policy that it is of; None before the first evaluation."""
    stale: int = 0
    """Evaluations since."""


class DevAnswers:
    """The answers of one training to dev prompts. All ranks call its methods; rank 0 asks and writes."""

    def __init__(
        self,
        loop: Loop,
        prompts: Sequence[DevPrompt],
        tokenizer: PreTrainedTokenizerBase,
        save_policy: Callable[[Path], None],
        answer: Answer,
        name: str,
        found: tuple[Path, Mapping[str, Any]] | None,
    ) -> None:
        """
        Args:
            prompts: the first of these are answered; none looks at nothing.
            save_policy: fills a model directory with the policy as it is.
            answer: called by rank 0 alone.
            name: of the training's checkpoints, beside which its best policy waits.
            found: the checkpoint to go on from, as `Loop.restore` gives it.
        """
        self.loop, self.prompts, self.tokenizer, self.save_policy, self.answer = (
            loop,
            prompts,
            tokenizer,
            save_policy,
            answer,
        )
        self.config, self.settings = loop.config, loop.config.rl
        self.best = Best()
        self.best_policy = loop.run.checkpoints / f"{name}-best"
        if found and BEST in found[1]:
            self.best = Best(**found[1][BEST])
        if loop.ranks.first:
            if found and self.best.step is not None:  # the directory may be of a later step, or of another node
                with replacing(self.best_policy, directory=True) as directory:
                    shutil.copytree(found[0] / BEST, directory, dirs_exist_ok=True)
            self._remove_later_samples()

    @property
    def enough(self) -> bool:
        """Whether `rl.patience` is over."""
        return self.settings.patience is not None and self.best.stale >= self.settings.patience

    def due(self, *, last: bool = False) -> bool:
        """Whether there is something to do at this step; `last` if no update will follow."""
        return bool(self._samples(last) or self._evaluated(last))

    def look(self, version: int, *, last: bool = False) -> None:
        """Answer, show and measure what is due. The generators hold the policy's weights as `version`.

        Raises:
            UserError: the measure of `rl.select` is not there.
            FloatingPointError: a weight is not finite.
        """
        if not self.due(last=last):
            return
        found = self._answer(version, last) if self.loop.ranks.first else {}
        metrics: dict[str, float] = self.loop.ranks.broadcast(found)
        if not self._evaluated(last):
            return
        if self.settings.select:
            self._keep_if_best(metrics)
            metrics |= {"rl_eval/best": self.best.value, "rl_eval/best_step": float(self.best.step or 0)}
        self.loop.log_evaluation(metrics)
        if self.enough:
            self.loop.note(
                f"stopped after {self.loop.step} steps: {self.best.stale} evaluations without a better "
                f"{self.settings.select}"
            )

    # ---- the best policy

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint has to keep beside `save_best`."""
        return {BEST: asdict(self.best)} if self.settings.select else {}

    def save_best(self, directory: Path) -> None:
        """Put the best policy into a checkpoint: on its own it might be of a later step than what goes on from it."""
        if self.best.step is not None:
            shutil.copytree(self.best_policy, directory / BEST)

    def publish(self, directory: Path) -> None:
        """Write the policy that the stage leaves: the best one with `rl.select`, or else the last one."""
        if self.best.step is None:
            self.save_policy(directory)
            return
        shutil.copytree(self.best_policy, directory, dirs_exist_ok=True)
        self.loop.note(
            f"policy/ is that of step {self.best.step} of {self.loop.step}: its {self.settings.select} on "
            f"{len(self.prompts[: self.settings.eval_prompts])} dev prompts was best, {self.best.value:.4f}"
        )

    def _keep_if_best(self, metrics: Mapping[str, float]) -> None:
        select = self.settings.select
        value = metrics.get(f"rl_eval/{select}", metrics.get(f"rl_eval/rewards/{select}"))
        if value is None:
            raise UserError(f"rl.select: this run has no {select} to choose by; take another measure")
        if not value > self.best.value:
            self.best.stale += 1
            return
        self.loop.require_finite()
        self.best = Best(value, self.loop.step)
        if self.loop.ranks.first:
            self.save_policy(self.best_policy)

    # ---- the answers, on rank 0

    def _samples(self, last: bool) -> Sequence[DevPrompt]:
        return self.prompts[: self.settings.sample_prompts] if self._at(self.settings.sample_every, last) else ()

    def _evaluated(self, last: bool) -> Sequence[DevPrompt]:
        return self.prompts[: self.settings.eval_prompts] if self._at(self.settings.eval_every, last) else ()

    def _at(self, every: int | None, last: bool) -> bool:
        return every is not None and (last or self.loop.step % every == 0)

    def _answer(self, version: int, last: bool) -> dict[str, float]:
        """Answer near-greedily, and show some; what is measured of them, where that is due."""
        started = time.perf_counter()
        samples, evaluated = self._samples(last), self._evaluated(last)
        answers = self._draw(max(samples, evaluated, key=len), self.config.evaluate, "rl-dev", version)
        if samples:
            self._show(samples, answers, version)
        if not evaluated:
            return {}
        drawn = self._draw(evaluated, self.settings.draw, "rl-dev-kl", version)
        found = measured(answers[: len(evaluated)], drawn, self.settings.missing_eos_reward)
        if self.settings.select in ROUGE_NAMES:  # what else needs it does not have to load it
            found |= self._rouge(evaluated, answers)
        return found | {
            "rl_eval/weight_version": float(version),
            "time/evaluation": time.perf_counter() - started,
        }

    def _rouge(self, prompts: Sequence[DevPrompt], answers: Sequence[Trajectory]) -> dict[str, float]:
        """ROUGE with the references of the prompts that have one."""
        pairs = [
            (decode_trajectory(self.tokenizer, answer), each.prompt.reference)
            for each, answer in zip(prompts, answers, strict=False)
            if each.prompt.reference is not None
        ]
        if not pairs:
            return {}
        texts, references = zip(*pairs, strict=True)
        return {f"rl_eval/{name}": value for name, value in rouge(texts, references).items()}

    def _draw(self, prompts: Sequence[DevPrompt], draw: DrawConfig, seeded_as: str, version: int) -> list[Trajectory]:
        turns = self.config.environment.max_turns if self.config.environment else 1
        sampling = sampling_of(self.tokenizer, self.config.data, draw, turns)
        requests = requests_for([each.encoded for each in prompts], 1, self.config.seed, seeded_as)
        return self.answer(requests, sampling, version)

    def _show(self, prompts: Sequence[DevPrompt], answers: Sequence[Trajectory], version: int) -> None:
        rows = [
            {
                "step": self.loop.step,
                "weight_version": version,
                "id": each.prompt.id,
                "prompt": each.prompt.text,
                "reference": each.prompt.reference,
                "answer": decode_trajectory(self.tokenizer, answer),
                "score": score_of(answer.rewards, answer.finish_reason == "eos", self.settings.missing_eos_reward),
                "gold": answer.gold,
                "tokens": answer.written_tokens,
                "ended": answer.finish_reason == "eos",
            }
            for each, answer in zip(prompts, answers[: len(prompts)], strict=True)
        ]
        file = self.loop.run.dev_samples / f"step_{self.loop.step:06d}.jsonl"
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.loop.run.upload(self.loop.run.dev_samples)
        self.loop.show_answers(answers_text(rows))

    def _remove_later_samples(self) -> None:
        """Those of an earlier attempt, which this one takes back."""
        for file in self.loop.run.dev_samples.glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) >= self.loop.step:
                file.unlink()


def measured(
    answers: Sequence[Trajectory], drawn: Sequence[Trajectory], missing_eos_reward: float | None
) -> dict[str, float]:
    """The metrics of an evaluation.

    Args:
        answers: near-greedy ones, scored.
        drawn: answers of their own at the training temperature, for the KL.
        missing_eos_reward: the score of an answer that does not end.
    """
    ended = [answer.finish_reason == "eos" for answer in answers]
    gold = [answer.gold for answer in answers if answer.gold is not None]
    worded = [answer.wording for answer in answers if answer.wording is not None]
    score = [score_of(a.rewards, end, missing_eos_reward) for a, end in zip(answers, ended, strict=True)]
    return {
        "rl_eval/prompts": float(len(answers)),
        "rl_eval/score": statistics.fmean(score),
        **{
            f"rl_eval/rewards/{name}": statistics.fmean(a.rewards[name] for a in answers) for name in answers[0].rewards
        },
        **({"rl_eval/gold": statistics.fmean(gold)} if gold else {}),
        "rl_eval/kl": statistics.fmean(each.log_ratio for each in drawn),
        "rl_eval/length": statistics.fmean(answer.written_tokens for answer in answers),
        "rl_eval/eos_rate": statistics.fmean(ended),
        **({f"rl_eval/{name}": value for name, value in diversity(worded).items()} if worded else {}),
    }

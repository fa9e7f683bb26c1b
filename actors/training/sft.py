"""Supervised fine-tuning: the loop that runs inside Ray Train's workers.

    { global batch, loss over its tokens, AdamW } per step; now and then { dev loss, ROUGE of answers, checkpoint }

The checkpoint with the best mean ROUGE on dev prompts, and of equal ones that with the lowest dev loss, becomes the run
folder's `sft/`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.pools.remote import Remote, fetch
from actors.rollouts.coordinator_link import CoordinatorLink, Setup
from actors.rollouts.publisher import Publisher
from actors.training.loop import Loop, LoopArguments
from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.algorithms.sft import predicted_tokens, summed_loss
from rayrlhf.config import Config
from rayrlhf.data.epochs import Epochs
from rayrlhf.data.rows import Row
from rayrlhf.data.tokens import decode_response, sampling_of
from rayrlhf.errors import UserError
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import context_length, load_policy, load_tokenizer
from rayrlhf.models.lora import load_trained_state, trained_state
from rayrlhf.models.saving import save_model
from rayrlhf.rewards.rouge import rouge
from rayrlhf.runs.storage import local_copy
from rayrlhf.trajectory import GenerationRequest, derive_seed


@dataclass(frozen=True)
class DevPrompt:
    """A prompt to answer, and a person's answer as text (for ROUGE) and as tokens (for the dev loss)."""

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reference: str


@dataclass(frozen=True)
class SFTArguments(LoopArguments):
    """What every worker needs; picklable, paths absolute."""

    model: str
    """Resolved: an absolute directory, a URI or a hub name."""
    train: Any
    """list[Row] whose masks cover the responses, or `actors.pools.remote.put` of it."""
    dev: Any
    """list[DevPrompt], or `put` of it. The first `sft.eval_prompts` are answered as well."""
    coordinator: Remote | None
    """Answers dev prompts; without it the checkpoint with the lowest dev loss is kept."""
    setup: Setup = field(default_factory=Setup)
    """What to tell a coordinator that takes the place of this one."""


@dataclass
class Progress:
    """Where the run stands beside its step; in the checkpoint."""

    version: int = 0
    """Weight version that was sent to the generators last."""
    best: float = float("-inf")
    """The best score: mean ROUGE, or minus the dev loss where nothing answers."""
    loss: float = float("inf")
    """Dev loss of the checkpoint with that score."""
    stale: int = 0
    """Evaluations since the best one."""

    def improves(self, score: float, loss: float) -> bool:
        """Take an evaluation in: whether its score is higher than all before, or equal to the best with a lower loss.

        ROUGE alone would not do: it is 0 time after time while answers share no word with the references.
        """
        better = (score, -loss) > (self.best, -self.loss)
        if better:
            self.best, self.loss = score, loss
        self.stale = 0 if better else self.stale + 1
        return better


def sft_loop(args: SFTArguments) -> None:
    """Fine-tune on demonstrations.

    A restart continues from the last evaluation, or from the step at which the loop was asked to stop: weights,
    optimiser, step, best score, and the best model so far, which waits in `checkpoints/NAME-best`. The finished one
    appears in the run folder's `sft/`.

    Raises:
        UserError: no data, or rows that are longer than the model's context.
        FloatingPointError: a gradient, the dev loss or a weight is not finite.
    """
    config, settings = args.config, args.config.sft
    with Loop("sft", args) as loop:
        run, ranks = loop.run, loop.ranks
        train: list[Row] = fetch(args.train)
        dev: list[DevPrompt] = fetch(args.dev)
        start = local_copy(args.model)
        tokenizer = load_tokenizer(start, config.model.revision)
        model = loop.trained("model", load_policy(start, config.model.revision, ranks.device), config.seed)
        forward = Forward(
            model, pad_token_id=tokenizer.pad_token_id, max_tokens=settings.micro_batch_tokens, dtype=config.model.dtype
        )
        link = CoordinatorLink(args.coordinator, args.setup, config) if args.coordinator else None
        publisher = Publisher(model, local=link.remote.local) if link else None
        if settings.loss_on == "all":
            train = [Row(row.ids, np.arange(len(row.ids)) > 0) for row in train]
        dev_rows = [Row.completion(p.prompt_ids, p.response_ids) for p in dev]
        _check(train, dev_rows, context_length(model.config))

        epochs = Epochs(len(train), settings.batch_size, settings.epochs, settings.evals_per_epoch, config.seed)
        optimizer = Optimizer(model, settings.optimizer, epochs.steps)
        # Beside the checkpoints of these settings: those of others have a best model of their own.
        progress, best_model = Progress(), run.checkpoints / f"{args.checkpoints}-best"
        if found := loop.restore():
            _, state = found
            load_trained_state(model, state["model"])
            optimizer.load_state_dict(state["optimizer"])
            progress = Progress(**state["progress"])

        def dev_loss() -> float:
            loss = summed_loss(forward, dev_rows, ranks) / predicted_tokens(dev_rows)
            if not np.isfinite(loss):  # the same on all ranks
                raise FloatingPointError(f"sft: the dev loss after step {loop.step} is {loss}")
            return loss

        def save() -> None:
            loop.save({
                "model": trained_state(model), "optimizer": optimizer.state_dict(), "progress": asdict(progress),
            })  # fmt: skip

        loop.steps = epochs.steps
        if loop.step == 0:
            loop.log({"sft/dev_loss": dev_loss()})
        while loop.step < epochs.steps and progress.stale < settings.patience:
            started = time.perf_counter()
            batch = [train[i] for i in epochs.batch(loop.step)]
            count, lr = predicted_tokens(batch), optimizer.lr
            loss = summed_loss(forward, batch, ranks, scale=1.0 / count) / count
            norm = optimizer.step(ranks)
            seconds = time.perf_counter() - started
            evaluate = epochs.evaluates_after(loop.step)
            loop.step += 1
            loop.log({
                "sft/loss": loss, "sft/lr": lr, "sft/grad_norm": norm, "sft/tokens": count, "time/step": seconds,
                "throughput/tokens_per_s": sum(len(row.ids) for row in batch) / seconds,
                "memory/learner_peak_mib": ranks.peak_memory_mib(),
            })  # fmt: skip
            if not evaluate:
                if loop.stopping():
                    save()
                    return
                continue
            loop.require_finite()  # before generators get the weights, and before the best model is kept
            metrics = {"sft/dev_loss": dev_loss()}
            score = -metrics["sft/dev_loss"]
            if link and publisher:
                answered = (
                    answer_dev_prompts(link, publisher, tokenizer, dev, config, progress) if ranks.first else ({}, {})
                )
                (measured, sample), progress.version = ranks.broadcast((answered, progress.version))
                metrics |= measured
                loop.sample(sample)
                score = metrics["sft/rouge_mean"]
            # On all ranks, which hold the same numbers.
            if progress.improves(score, metrics["sft/dev_loss"]) and ranks.first:
                save_model(model, tokenizer, best_model, stop_tokens=config.data.stop_tokens)
                run.upload(best_model)
            loop.log(metrics | {"sft/best": progress.best})
            save()
            if loop.stopping():
                return
        if loop.step < epochs.steps:
            loop.note(f"stopped after {loop.step} steps: {progress.stale} evaluations without a better score")

        # The best model, which was looked at when it was kept; what the last update left is not published.
        def publish_best(directory: Path) -> None:
            shutil.copytree(run.download(best_model), directory, dirs_exist_ok=True)

        loop.finish(publish_best)


def answer_dev_prompts(
    link: CoordinatorLink, publisher: Publisher, tokenizer: PreTrainedTokenizerBase, dev: Sequence[DevPrompt],
    config: Config, progress: Progress,
) -> tuple[dict[str, float], dict[str, str]]:  # fmt: skip
    """Publish the weights, let the generators answer the first dev prompts near-greedily, and measure the answers.

    Returns ROUGE F1 in [0, 1] by name, the mean of rouge1, rouge2 and rougeL, the mean length in tokens and the share
    of answers that ended by themselves; and the first prompt with its reference and answer, to look at. Seeds stay
    the same from one evaluation to the next.
    """
    # The first load also starts the generators.
    progress.version = link.send_weights(publisher.publish, progress.version)
    asked = dev[: config.sft.eval_prompts]
    requests = [GenerationRequest(p.id, p.prompt_ids, 0, derive_seed(config.seed, "sft-eval", p.id)) for p in asked]
    sampling = sampling_of(tokenizer, config.data, config.evaluate)
    answers = link.call("generate", requests, sampling, progress.version)
    texts = [decode_response(tokenizer, answer.response_ids) for answer in answers]
    scores = rouge(texts, [p.reference for p in asked])
    metrics = {
        **{f"sft/{name}": value for name, value in scores.items()},
        "sft/rouge_mean": float(np.mean([scores["rouge1"], scores["rouge2"], scores["rougeL"]])),
        "sft/length": float(np.mean([len(answer.response_ids) for answer in answers])),
        "sft/eos_rate": float(np.mean([answer.finish_reason == "eos" for answer in answers])),
    }
    prompt = str(tokenizer.decode(asked[0].prompt_ids, skip_special_tokens=True))
    return metrics, {"prompt": prompt, "reference": asked[0].reference, "answer": texts[0]}


def _check(train: Sequence[Row], dev: Sequence[Row], context: int) -> None:
    if not train or not dev:
        raise UserError(f"sft: {len(train)} demonstrations to train on and {len(dev)} dev prompts; both need some")
    longest = max(len(row.ids) for row in [*train, *dev])
    if longest > context:
        raise UserError(
            f"sft: the longest demonstration has {longest} tokens and the model's context is {context}; "
            "lower data.max_prompt_tokens or data.max_response_tokens"
        )

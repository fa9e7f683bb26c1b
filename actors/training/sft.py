"""Supervised fine-tuning: the loop that runs inside Ray Train's workers.

    { global batch, loss over its tokens, AdamW } per step; now and then { dev loss, ROUGE of answers, checkpoint }

The checkpoint with the best mean ROUGE on dev prompts becomes the run folder's `sft/`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from actors.pools.monitoring import metrics_writer
from actors.pools.remote import Remote, fetch
from actors.rollouts.publisher import Publisher
from actors.training.fit import report, restored
from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.algorithms.sft import predicted_tokens, summed_loss
from rayrlhf.config import Config
from rayrlhf.data.epochs import Epochs
from rayrlhf.data.tokens import decode_response
from rayrlhf.errors import UserError
from rayrlhf.models.batching import Row
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import checkpoint_gradients, context_length, load_policy, load_tokenizer
from rayrlhf.models.lora import add_adapters, load_trained_state, trained_state
from rayrlhf.models.ranks import Ranks
from rayrlhf.models.saving import save_model
from rayrlhf.rewards.rouge import rouge
from rayrlhf.runs.folder import RunFolder
from rayrlhf.trajectory import GenerationRequest, Sampling, derive_seed


@dataclass(frozen=True)
class DevPrompt:
    """A prompt to answer, and a person's answer as text (for ROUGE) and as tokens (for the dev loss)."""

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reference: str


@dataclass(frozen=True)
class SFTArguments:
    """What every worker needs; picklable, paths absolute."""

    config: Config
    run_dir: str
    """Path or URI."""
    model: str
    """Resolved: an absolute directory or a hub name."""
    train: Any
    """list[Row] whose masks cover the responses, or `actors.pools.remote.put` of it."""
    dev: Any
    """list[DevPrompt], or `actors.pools.remote.put` of it. The first `sft.eval_prompts` are answered as well."""
    coordinator: Remote | None
    """Answers dev prompts; without it the checkpoint with the lowest dev loss is kept."""
    checkpoints: str = "sft"
    """Name of this training's checkpoints, see `Session.checkpoint_name`."""


@dataclass
class SFTState:
    """Where the run stands; in the checkpoint beside weights and optimiser."""

    step: int = 0
    """Optimiser steps done."""
    version: int = 0
    """Last weight version that was published."""
    best: float = float("-inf")
    stale: int = 0
    """Evaluations since the best one."""


def sft_loop(arguments: dict[str, Any]) -> None:
    """Fine-tune on demonstrations; `arguments["sft"]` is an `SFTArguments`.

    A restart continues from the last evaluation: weights, optimiser, step, best score, and the best model so far,
    which waits in `checkpoints/NAME-best`. The finished one appears in the run folder's `sft/`.

    Raises:
        UserError: no data, or rows that are longer than the model's context.
    """
    args: SFTArguments = arguments["sft"]
    config, settings = args.config, args.config.sft
    run, ranks = RunFolder(args.run_dir), Ranks(config.resources.learner.threads, gpu=config.resources.learner.gpus > 0)
    train: list[Row] = fetch(args.train)
    dev: list[DevPrompt] = fetch(args.dev)
    tokenizer = load_tokenizer(args.model, config.model.revision)
    model = load_policy(args.model, config.model.revision, ranks.device)
    if config.model.lora:
        add_adapters(model, config.model.lora, config.seed)
    if config.resources.learner.gradient_checkpointing:
        checkpoint_gradients(model)
    forward = Forward(
        model, pad_token_id=tokenizer.pad_token_id, max_tokens=settings.micro_batch_tokens, dtype=config.model.dtype
    )
    publisher = Publisher(model, local=args.coordinator.local) if args.coordinator else None
    if settings.loss_on == "all":
        train = [Row(row.ids, np.arange(len(row.ids)) > 0) for row in train]
    dev_rows = [Row.completion(p.prompt_ids, p.response_ids) for p in dev]
    _check(train, dev_rows, context_length(model.config))

    epochs = Epochs(len(train), settings.batch_size, settings.epochs, settings.evals_per_epoch, config.seed)
    optimizer = Optimizer(model, settings.optimizer, epochs.steps)
    # Beside the checkpoints of these settings: those of others have a best model of their own.
    state, best_model = SFTState(), run.checkpoints / f"{args.checkpoints}-best"
    with restored() as checkpoint:
        if checkpoint:
            stored = torch.load(checkpoint / "sft.pt", weights_only=True, map_location=ranks.device)
            load_trained_state(model, stored["model"])
            optimizer.load_state_dict(stored["optimizer"])
            state = SFTState(**stored["state"])
    writer = metrics_writer(run.address, config.name) if ranks.first else None

    def log(metrics: dict[str, float]) -> None:
        if writer:
            writer.write("sft", state.step, metrics)

    def dev_loss() -> float:
        return summed_loss(forward, dev_rows, ranks) / predicted_tokens(dev_rows)

    def write(directory: Path) -> None:
        stored = {"model": trained_state(model), "optimizer": optimizer.state_dict(), "state": asdict(state)}
        torch.save(stored, directory / "sft.pt")

    if state.step == 0:
        log({"sft/steps": epochs.steps, "sft/dev_loss": dev_loss()})
    while state.step < epochs.steps and state.stale < settings.patience:
        started = time.perf_counter()
        batch = [train[i] for i in epochs.batch(state.step)]
        count, lr = predicted_tokens(batch), optimizer.lr
        loss = summed_loss(forward, batch, ranks, scale=1.0 / count) / count
        norm = optimizer.step(ranks)
        seconds = time.perf_counter() - started
        evaluate = epochs.evaluates_after(state.step)
        state.step += 1
        log({
            "sft/loss": loss, "sft/lr": lr, "sft/grad_norm": norm, "sft/tokens": count, "time/step": seconds,
            "throughput/tokens_per_s": sum(len(row.ids) for row in batch) / seconds,
            "memory/learner_peak_mib": ranks.peak_memory_mib(),
        })  # fmt: skip
        if not evaluate:
            continue
        metrics = {"sft/dev_loss": dev_loss()}
        score = -metrics["sft/dev_loss"]
        if publisher:
            measured, sample = answer_dev_prompts(publisher, tokenizer, dev, args, state) if ranks.first else ({}, {})
            measured, state.version = ranks.broadcast((measured, state.version))
            metrics |= measured
            if writer:
                writer.write_text("sft", state.step, "sample", sample)
            score = metrics["sft/rouge_mean"]
        state.stale = 0 if score > state.best else state.stale + 1
        if score > state.best:
            state.best = score
            if ranks.first:
                save_model(model, tokenizer, best_model)
                run.upload(best_model)
        log(metrics | {"sft/best": state.best})
        report(ranks, {"step": state.step} | metrics, write)
    if writer:
        if state.step < epochs.steps:
            note = f"stopped after {state.step} steps: {state.stale} evaluations without a better score"
            writer.write_text("sft", state.step, "note", note)
        with run.writing("sft") as directory:
            shutil.copytree(run.download(best_model), directory, dirs_exist_ok=True)
        writer.close()


def answer_dev_prompts(
    publisher: Publisher, tokenizer: PreTrainedTokenizerBase, dev: Sequence[DevPrompt], args: SFTArguments,
    state: SFTState,
) -> tuple[dict[str, float], dict[str, str]]:  # fmt: skip
    """Publish the weights, let the generators answer the first dev prompts near-greedily, and measure the answers.

    Returns ROUGE F1 in [0, 1] by name, the mean of rouge1, rouge2 and rougeL, the mean length in tokens and the share
    of answers that ended by themselves; and the first prompt with its reference and answer, to look at. Seeds stay
    the same from one evaluation to the next.
    """
    coordinator, config, resources = args.coordinator, args.config, args.config.resources
    assert coordinator is not None
    state.version = coordinator.call("next_version", state.version, timeout_s=resources.coordinator_timeout_s)
    publication = publisher.publish(state.version)
    # The first load also starts the generators.
    coordinator.call("load_weights", publication, timeout_s=resources.coordinator_timeout_s)
    asked = dev[: config.sft.eval_prompts]
    requests = [GenerationRequest(p.id, p.prompt_ids, 0, derive_seed(config.seed, "sft-eval", p.id)) for p in asked]
    sampling = Sampling(config.evaluate.temperature, config.data.max_response_tokens, int(tokenizer.eos_token_id))
    answers = coordinator.call("generate", requests, sampling, state.version, timeout_s=resources.coordinator_timeout_s)
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

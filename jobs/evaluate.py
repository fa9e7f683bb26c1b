"""Stage `evaluate`: SFT and policy side by side on held-out records. `... -- python -m jobs.evaluate --config FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jobs.console import console
from jobs.session import Session
from jobs.stage import main, stage
from rayrlhf.config import Config
from rayrlhf.config_data import paths_of
from rayrlhf.data.records import Prompt
from rayrlhf.data.tokens import decode_trajectory
from rayrlhf.reports.evaluation import PREVIOUS, Answers, samples_table, summarize, write_evaluation, write_samples
from rayrlhf.reports.page import write_report
from rayrlhf.reports.progress import sample_panel
from rayrlhf.reports.tables import evaluation_table
from rayrlhf.rewards.functions import scores
from rayrlhf.rewards.gold import gold_labeller, gold_measures
from rayrlhf.rewards.labeller import Labeller
from rayrlhf.sections import DrawConfig
from rayrlhf.trajectory import Trajectory


@stage("evaluate", again=lambda session: session.config.evaluate.prompts is not None)
def evaluate(session: Session) -> None:
    """Answer held-out prompts with both models; writes evaluation.json, samples.parquet and report.html."""
    config, run = session.config, session.run
    prompts = evaluation_prompts(session)
    session.rollouts.wait_for_generators()
    baseline = session.starts.baseline
    session.rollouts.start_scorers(prompts, baseline, gold=False)
    labeller = gold_labeller(config)
    # ROUGE with the reference says nothing of a trajectory in turns.
    compared = [replace(p, reference=None) for p in prompts] if config.environment else prompts

    version = session.rollouts.load_weights(baseline)
    sft = model_answers(session, "sft", version, prompts, labeller)
    best = best_answers(session, version, prompts, labeller) if config.evaluate.best_of else None
    baselines = [best] if best else []
    if config.has("dpo") and config.has("rl"):
        version = session.rollouts.load_weights(run.address_of(run.dpo))
        baselines.append(model_answers(session, "dpo", version, prompts, labeller, with_kl=True))
    if previous := session.starts.given.get("evaluate.previous_from"):
        version = session.rollouts.load_weights(previous)
        baselines.append(model_answers(session, PREVIOUS, version, prompts, labeller, with_kl=True))
    version = session.rollouts.load_weights(session.starts.final_policy)
    policy = model_answers(session, "policy", version, prompts, labeller, with_kl=True)
    reference = text_answers(session, "reference", [p.reference for p in prompts], prompts, None)
    title = text_answers(session, "title", [p.title for p in prompts], prompts, labeller)

    asked = paths_of(config.data.prompts or config.data.demonstrations)
    result = summarize(
        compared,
        sft,
        policy,
        reference,
        title if any(p.title for p in prompts) else None,
        baselines,
        labeller=labelled_by(config),
        metadata={
            "data": config.evaluate.prompts or f"{asked}, {config.evaluate.split} split",
            **config.evaluate.model_dump(include=set(DrawConfig.model_fields)),
            "kl_temperature": config.rl.temperature,
            **({"best_of": config.evaluate.best_of} if best else {}),
            "seed": config.seed,
            "max_prompt_tokens": config.data.max_prompt_tokens,
            "max_response_tokens": config.data.max_response_tokens,
            "min_response_tokens": config.data.min_response_tokens,
        },
        samples=config.evaluate.bootstrap_samples,
        seed=config.seed,
    )
    table = samples_table(compared, [reference, sft, *baselines, policy])
    if config.evaluate.prompts is None:
        write_samples(run.samples, table)
        write_evaluation(run.evaluation, result)
        run.upload(run.samples, run.evaluation)
        run.upload(write_report(run))
        console.print(f"report: {run.address_of(run.report)}")
    else:  # the run's own evaluation stays that of its split
        other = Path(config.evaluate.prompts).stem
        samples, evaluation = run.path / f"samples-{other}.parquet", run.path / f"evaluation-{other}.json"
        write_samples(samples, table)
        write_evaluation(evaluation, result)
        run.upload(samples, evaluation)
        console.print(f"evaluation of {config.evaluate.prompts}: {run.address_of(evaluation)}")
    console.print(
        sample_panel(
            prompts[0].text, prompts[0].reference, policy.texts[0] or "", title="first of these posts, policy's answer"
        )
    )
    console.print(evaluation_table(result))


def labelled_by(config: Config) -> str:
    """What made the comparisons, as the evaluation calls it."""
    kind = config.collect.labeller.kind
    return "people" if config.data.comparisons is not None or kind == "file" else kind


def evaluation_prompts(session: Session) -> list[Prompt]:
    """The prompts of `evaluate.split`, or those of `evaluate.prompts`."""
    session.data.read()  # checks that they overlap with nothing that was trained on
    return list(session.data.evaluated[: session.config.evaluate.max_prompts])


def model_answers(
    session: Session,
    name: str,
    version: int,
    prompts: list[Prompt],
    labeller: Labeller | None,
    *,
    with_kl: bool = False,
) -> Answers:
    """Near-greedy answers of the model that the generators hold as `version`.

    The KL to the SFT model is of separate samples at the training temperature.
    """
    config = session.config
    encoded = session.data.prompts(prompts)
    sampled = session.rollouts.generate(encoded, config.evaluate, version, "evaluate", play=True)
    scored = session.rollouts.score(sampled, config.evaluate.temperature)
    kl = None
    if with_kl:
        drawn = session.rollouts.generate(encoded, config.rl.draw, version, "evaluate-kl", play=True)
        kl = [t.log_ratio for t in session.rollouts.score(drawn, config.rl.temperature)]
    texts = [decode_trajectory(session.tokenizer, t) for t in scored]
    return Answers(
        name,
        texts,
        rewards=summed_rewards(config, scored),
        gold=gold_measures(labeller, prompts, texts),
        lengths=[t.written_tokens for t in scored],
        finished=[t.finish_reason == "eos" for t in scored],
        kl=kl,
    )


def best_answers(session: Session, version: int, prompts: list[Prompt], labeller: Labeller | None) -> Answers:
    """For each prompt, the best of `evaluate.best_of` samples of the SFT model, whose `version` the generators hold.

    They are drawn as those of the stage `rl` are, and chosen by what that stage maximises.
    """
    config, n = session.config, session.config.evaluate.best_of
    assert n is not None
    encoded = session.data.prompts(prompts)
    drawn = session.rollouts.generate(encoded, config.rl.draw, version, "evaluate-best-of", samples=n, play=True)
    scored = session.rollouts.score(drawn, config.rl.temperature)
    by_prompt = scores(scored, config.rl.missing_eos_reward).reshape(-1, n)
    chosen = [scored[i * n + int(place)] for i, place in enumerate(by_prompt.argmax(1))]
    texts = [decode_trajectory(session.tokenizer, t) for t in chosen]
    return Answers(
        "best_of",
        texts,
        rewards=summed_rewards(config, chosen),
        gold=gold_measures(labeller, prompts, texts),
        lengths=[t.written_tokens for t in chosen],
        finished=[t.finish_reason == "eos" for t in chosen],
        kl=np.full(len(chosen), np.log(n) - (n - 1) / n),
    )


def text_answers(
    session: Session,
    name: str,
    texts: list[str | None],
    prompts: list[Prompt],
    labeller: Labeller | None,
) -> Answers:
    """A baseline that is text already (references, titles), scored by the same reward model."""
    encoded = session.data.prompts(prompts)
    responses = session.data.as_responses(prompts, [text or "" for text in texts])
    given = [
        Trajectory(
            p.id,
            0,
            0,
            np.array(p.ids),
            np.array(ids),
            np.zeros(len(ids), np.float32),
            np.zeros(len(ids), np.int64),
            "eos",
        )
        for p, ids in zip(encoded, responses, strict=True)
    ]
    scored = session.rollouts.score(given, session.config.evaluate.temperature)
    gold = gold_measures(labeller, prompts, texts)
    # A text that is given cannot be played.
    rewards = None if session.config.environment else summed_rewards(session.config, scored)
    return Answers(name, texts, rewards=rewards, gold=gold, lengths=[len(r) for r in responses])


def summed_rewards(config: Config, scored: Sequence[Trajectory]) -> list[float] | None:
    """[n] weighted sum of the rewards; None in a run without rewards, such as one whose policy is that of `dpo`."""
    return [sum(t.rewards.values()) for t in scored] if config.scored_by else None


if __name__ == "__main__":
    main(evaluate)

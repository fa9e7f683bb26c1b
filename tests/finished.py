"""The folder of a finished run of a few seconds, with tiny models: for commands that look at one or use its models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from rayrlhf.config import LoRAConfig
from rayrlhf.config_file import dump_config, parse_config
from rayrlhf.data.template import tldr_prompt
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.lora import add_adapters
from rayrlhf.models.saving import save_model
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import MetricsWriter

POST = tldr_prompt("dogs", "My dog", "He ate my homework.").text


def finished_run(directory: Path, lora: bool = False, **settings: Any) -> RunFolder:
    """A run with SFT model, reward model and policy, all of them the embedded model and slightly changed."""
    tree = {"name": "one", "runs_dir": str(directory), "data": {"max_prompt_tokens": 40, "max_response_tokens": 8}}
    tree |= {"model": {"lora": {"rank": 2, "alpha": 4}}} if lora else {}
    config = parse_config(tree | settings, "test")
    run = RunFolder(directory / "one")
    run.path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(dump_config(config), sort_keys=False))
    base = resolve_model("embedded:opt-tiny")
    tokenizer = load_tokenizer(base)
    for seed, (output, start) in enumerate(((run.sft, base), (run.policy, str(run.sft)))):
        model = load_policy(start)
        torch.manual_seed(seed)
        if lora:
            add_adapters(model, LoRAConfig(rank=2, alpha=4), seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        save_model(model, tokenizer, output)
    save_model(load_reward_model(str(run.sft), fresh_head_seed=0), tokenizer, run.reward_model, reward_bias=0.5)
    with MetricsWriter(run.path) as writer:
        for stage, steps in (("sft", 3), ("rl", 2)):
            for step in range(1, steps + 1):
                writer.write(stage, step, {f"{stage}/loss": float(step)})
    mean = {"mean": 0.25, "low": 0.125, "high": 0.5, "n": 2}
    evaluation = {
        "sft": {"gold": mean, "kl": None},
        "policy": {"gold": {**mean, "mean": 0.375}, "kl": mean},
        "differences": {"policy_minus_sft": {"gold": {**mean, "p": 0.5}}},
        "metadata": {"prompts": 2, "data": "embedded:tldr, test split"},
    }
    run.evaluation.write_text(json.dumps(evaluation))
    scorers = {"reward_model": mean, "longer": mean, "shorter": mean}
    minus = {"longer": mean, "shorter": mean}
    accuracy = {"pairs": 3, "prompts": 2, "accuracy": scorers, "reward_model_minus": minus}
    run.reward_accuracy.write_text(json.dumps(accuracy))
    rows: dict[str, list[str | None]] = {"id": ["a", "b"], "post": [POST, tldr_prompt("cats", "", "She sleeps.").text]}
    rows |= {"reference": ["A dog ate homework.", None], "sft": ["s", "t"], "policy": ["p", "q"]}
    pq.write_table(pa.table(rows), run.samples)
    pq.write_table(pa.table({"id": ["a"], "prompt": [POST], "responses": [["x", "y"]]}), run.comparisons)
    return run

"""The card of an exported model (README.md): what it is, what it was trained on, how good it is, how to load it.

Paths of the machine that trained it stay out: of a directory or a file only its name is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

import rayrlhf
from rayrlhf.config import Config
from rayrlhf.reports.compare import table
from rayrlhf.reports.measures import DIFFERENCES, EVALUATED, SCORERS, SOURCES, interval_text
from rayrlhf.reports.results import read_accuracy, read_evaluation
from rayrlhf.runs.folder import RunFolder, stored_config, stored_contents
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.models import REWARD_MODEL
from rayrlhf.runs.stages import STAGES, stages_of

_STAGE_OF = {"sft": "sft", "dpo": "dpo", "policy": "rl", REWARD_MODEL: REWARD_MODEL}
"""The stage that makes the model of each name."""
_DESCENT = {
    "sft": ("sft",), "dpo": ("dpo", "sft"), "policy": ("rl", "dpo", "sft"), REWARD_MODEL: (REWARD_MODEL, "sft"),
}  # fmt: skip
"""The stages that may have begun with another model, the last one first."""
_OF_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_TOLD = ("gold", "reward", "rougeL", "length", "kl", "win_rate_vs_sft", "lc_win_rate_vs_sft", "repetition")
"""Of an evaluation, what the card's front matter lists for search."""
_VS_SFT = "policy_minus_sft"


class Place(NamedTuple):
    """A model or a source of data, as a card may name it."""

    name: str
    on_hub: bool


@dataclass(frozen=True)
class Exported:
    """What is exported."""

    name: str
    """Of the model: sft, dpo, policy or reward_model."""
    title: str
    """Of the card: the directory's name, or the repository's."""
    license: str | None
    adapters_of: Place | None = None
    """The model onto which adapters belong; None for a whole model."""


def model_card(run: RunFolder, exported: Exported) -> str:
    """The text of README.md, front matter included."""
    config = stored_config(run)
    evaluation, accuracy = read_evaluation(run, "metadata") or {}, read_accuracy(run) or {}
    measured = _evaluation(evaluation, _source(config, exported))
    if exported.name == REWARD_MODEL:
        measured = _reward_accuracy(accuracy)
    parts = [
        f"# {exported.title}",
        _what(run, config, exported),
        "## How to load it",
        _loading(config, exported),
        "## Training",
        _training(run, config, exported),
        "## Evaluation",
        measured,
        "## Limits",
        _limits(exported),
    ]
    return f"---\n{_front_matter(run, config, exported, evaluation).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def place_of(given: str, here: bool = False) -> Place:
    """How to name what a config names: on the hub or of the package as it is; of a path or a URI only the last part.

    Args:
        given: the config's value.
        here: whether it is known to be a path.

    >>> place_of("/home/me/posts.jsonl").name, place_of("org/model").name, place_of("embedded:tldr").name
    ('posts.jsonl', 'org/model', 'embedded:tldr')
    """
    named = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", given) is not None and PurePath(given).suffix not in _OF_FILES
    on_hub = named and not here and not Path(given).exists()
    whole = on_hub or given.startswith("embedded:")
    return Place(given if whole else PurePath(given.partition("?")[0]).name, on_hub)


def _base(run: RunFolder, config: Config, name: str) -> Place:
    """The model from which the one of this name descends: that of a `from` on its way, or the run's base."""
    known = stored_contents(run)
    for stage in _DESCENT[name]:
        if (given := getattr(config, stage).start) is not None:
            return place_of(given, f"{stage}.from" in known)
    return place_of(config.model.path, "model.path" in known)


def _sources(run: RunFolder, config: Config) -> list[Place]:
    """Where the run's data come from, each once."""
    known, found = stored_contents(run), []
    for kind in ("demonstrations", "comparisons", "prompts"):
        sources = getattr(config.data, kind) or ()
        for number, source in enumerate(sources):
            key = f"data.{kind}.path" if len(sources) == 1 else f"data.{kind}[{number}].path"
            found.append(place_of(source.path, key in known))
    return list(dict.fromkeys(found))


def _front_matter(run: RunFolder, config: Config, exported: Exported, evaluation: Mapping[str, Any]) -> ModelCardData:
    base = exported.adapters_of or _base(run, config, exported.name)
    measured = evaluation.get(_source(config, exported)) or {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=_held_out(evaluation),
            metric_type=name,
            metric_name=EVALUATED[name],
            metric_value=round(measured[name]["mean"], 4),
        )
        for name in _TOLD
        if measured.get(name)
    ]
    return ModelCardData(
        license=exported.license,
        base_model=base.name if base.on_hub else None,
        datasets=[source.name for source in _sources(run, config) if source.on_hub] or None,
        library_name="peft" if exported.adapters_of else "transformers",
        pipeline_tag="text-classification" if exported.name == REWARD_MODEL else "text-generation",
        tags=["rayrlhf", "rlhf", *_methods(config, exported.name)],
        model_name=exported.title if results else None,
        eval_results=results or None,
    )


def _methods(config: Config, name: str) -> list[str]:
    """The methods that made a model, as tags."""
    return {
        "sft": ["sft"],
        "dpo": ["sft", config.dpo.loss],
        "policy": ["sft", *([config.dpo.loss] if config.has("dpo") else []), config.rl.algorithm],
        REWARD_MODEL: ["reward-model"],
    }[name]


def _source(config: Config, exported: Exported) -> str:
    """What evaluation.json calls the model: the last one that a run trains is its policy."""
    return "policy" if exported.name == "dpo" and not config.has("rl") else exported.name


def _what(run: RunFolder, config: Config, exported: Exported) -> str:
    stage = STAGES[_STAGE_OF[exported.name]]
    what = "The LoRA adapters" if exported.adapters_of else "The model"
    if exported.name == REWARD_MODEL:
        what = "The reward model"
    return (
        f"{what} of the stage `{stage.name}` ({stage.title.lower()}) of the run `{config.name}`, "
        f"made with rayrlhf {rayrlhf.__version__} from `{_base(run, config, exported.name).name}`."
        + ("" if exported.license else "\nNo licence was given when it was exported.")
    )


def _loading(config: Config, exported: Exported) -> str:
    title, longest = exported.title, config.data.max_response_tokens
    if exported.adapters_of:
        base = exported.adapters_of.name
        where = "" if exported.adapters_of.on_hub else f"`{base}` is the model on which the stage began.\n\n"
        return f"""{where}```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```"""
    if exported.name == REWARD_MODEL:
        return f"""```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
ids = tokenizer("a prompt and its answer", return_tensors="pt")["input_ids"]
with torch.no_grad():
    score = model(ids).logits[0, 0].item() + getattr(model.config, "reward_bias", 0.0)
```

`reward_bias` moves the mean score of references to 0; a plain loader leaves it out."""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
ids = tokenizer("a prompt", return_tensors="pt")["input_ids"]
answer = model.generate(ids, do_sample=True, temperature={config.rl.temperature:g}, max_new_tokens={longest})
print(tokenizer.decode(answer[0, ids.shape[1]:], skip_special_tokens=True))
```"""


def _training(run: RunFolder, config: Config, exported: Exported) -> str:
    data = [f"- Data: {', '.join(f'`{source.name}`' for source in _sources(run, config))}."]
    data.append(
        f"- Prompts of at most {config.data.max_prompt_tokens} tokens, "
        f"responses of at most {config.data.max_response_tokens}."
    )
    steps: dict[str, int] = {}
    for line in read_metrics(run.address):
        steps[line["stage"]] = max(steps.get(line["stage"], 0), line["step"])
    own = _STAGE_OF[exported.name]
    earlier = list(STAGES)[: list(STAGES).index(own) + 1]
    rows = [["stage", "steps", "learning rate"]]
    for stage in stages_of(config):
        if stage.trains and stage.name in earlier:
            section: Any = getattr(config, stage.name)
            rows.append([stage.title, str(steps.get(stage.name, "–")), f"{section.optimizer.lr:g}"])
    lora = f"- LoRA of rank {config.model.lora.rank}.\n" if config.model.lora else ""
    return "\n".join(data) + f"\n- Seed {config.seed}.\n{lora}\n{table(rows)}"


def _held_out(evaluation: Mapping[str, Any]) -> str:
    asked, _, split = evaluation.get("metadata", {}).get("data", "held-out records").partition(", ")
    return ", ".join(filter(None, (place_of(asked).name, split)))


def _evaluation(evaluation: Mapping[str, Any], source: str) -> str:
    if not evaluation:
        return "The run was not evaluated."
    shown = [each for each in SOURCES if each in evaluation]
    rows = [["measure", *(SOURCES[each].in_full for each in shown)]]
    for measure, words in EVALUATED.items():
        cells = [interval_text(evaluation[each].get(measure)) for each in shown]
        if set(cells) != {"–"}:
            rows.append([words, *cells])
    prompts = evaluation["metadata"]["prompts"]
    parts = [f"{prompts} prompts ({_held_out(evaluation)}); means with 95 % intervals over prompts.", table(rows)]
    differences = evaluation.get("differences", {}).get(_VS_SFT) or {}
    paired = [[EVALUATED[m], interval_text(differences[m])] for m in EVALUATED if differences.get(m)]
    if paired and source == "policy":
        parts.append(table([["measure", DIFFERENCES[_VS_SFT]], *paired]))
    return "\n\n".join(parts)


def _reward_accuracy(accuracy: Mapping[str, Any]) -> str:
    if not accuracy:
        return "Its accuracy on held-out pairs was not measured."
    rows = [["orders pairs by", "accuracy"]]
    rows += [[SCORERS[name], interval_text(value)] for name, value in accuracy["accuracy"].items() if name in SCORERS]
    return f"{accuracy['pairs']} held-out pairs of {accuracy['prompts']} prompts, with 95 % intervals.\n\n{table(rows)}"


def _limits(exported: Exported) -> str:
    if exported.name == REWARD_MODEL:
        return (
            "A score orders answers to one prompt, as the rankings did that it learnt from; it measures no truth.\n"
            "A policy that is trained against it for long finds answers that it likes and people do not."
        )
    return (
        "It has what its base and its data have, and their faults.\n"
        "It was measured as above and in no other way: it was not tested for safety, for truth, or on other tasks.\n"
        "A reward is a stand-in for what people want, and training against one may have overdone it."
    )

"""What a config asks for and may not mean, said once at the start of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rayrlhf.config import Config
from rayrlhf.config_rewards import EnvironmentReward
from rayrlhf.data.template import asks_as_template, end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def remarks(config: Config, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[str]:
    """One line each.

    Args:
        config: of the run.
        tokenizer: of its model.
        prompts: rendered, of the demonstrations.
    """
    found = []
    if config.environment and not any(isinstance(reward, EnvironmentReward) for reward in config.rewards):
        found.append(
            "the environment answers the policy, but its rewards are not used: no reward has the kind environment"
        )
    end = end_of_turn(tokenizer)
    if end and end not in (tokenizer.eos_token, *config.data.stop_tokens) and asks_as_template(tokenizer, prompts):
        found.append(
            f"the chat template ends a turn with {end!r}, but a response ends only with the EOS "
            f"{tokenizer.eos_token!r} or one of data.stop_tokens; add {end!r} to data.stop_tokens"
        )
    return found

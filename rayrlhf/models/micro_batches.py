"""How many tokens a micro-batch has where the config does not say: what memory has room for, up to a useful number."""

from __future__ import annotations

from dataclasses import dataclass

from rayrlhf.config import Config
from rayrlhf.models.checks import check_architecture, parameter_counts
from rayrlhf.models.logprobs import LOGITS

_FLOAT = 4
"""Bytes. In bfloat16 most activations take half of it, and the room that is left is a reserve."""
_KEPT = 32
"""A layer keeps at most so many numbers of each token for the backward pass, in units of the hidden size. Measured were
12 (OPT) to 31 (GPT-J)."""
_COPIES = 3
"""Of logits: themselves, their log-softmax and its gradient."""
USEFUL = {"learner": (4096, 32768), "scorers": (8192, 65536)}
"""Tokens of a micro-batch on CPUs and on a GPU, beyond which a pass gets hardly faster."""


@dataclass(frozen=True)
class Needs:
    """What a role takes of memory, in bytes."""

    states: float
    """Weights; of models that are trained also gradients and Adam's moments."""
    token: float
    """Activations of a token."""
    vocabulary: int
    """Logits of a token, a number and not bytes."""

    def bytes(self, tokens: int) -> float:
        """What a micro-batch takes, with all that stays between two."""
        return self.states + tokens * self.token + _COPIES * _FLOAT * min(tokens * self.vocabulary, LOGITS)

    def fitting(self, room: float, useful: int, longest: int) -> int:
        """The tokens of a micro-batch: `useful`, or half of it as often as they do not fit; at least a longest row."""
        tokens = useful
        while tokens > longest and self.bytes(tokens) > room:
            tokens //= 2
        return max(tokens, longest)


def needs(config: Config, model: str) -> dict[str, Needs]:
    """What the learner and a scorer need, by the names that `resources` has for them.

    Args:
        config: of the run.
        model: with which it begins, a directory or a hub name.

    Raises:
        UserError: see `check_architecture` and `parameter_counts`.
    """
    policy = check_architecture(model, config.model.revision, scores=False)
    own = policy.config.get_text_config()
    frozen, trained = parameter_counts(policy, config.model.lora)
    layers, layer = own.num_hidden_layers, _KEPT * _FLOAT * own.hidden_size
    if config.resources.learner.gradient_checkpointing:
        kept = layer + layers * _FLOAT * own.hidden_size
    else:
        kept = layers * layer
    models = 2 if config.has("rl") and config.rl.critic else 1
    return {
        "learner": Needs(models * _FLOAT * (frozen + 4 * trained), kept, own.vocab_size),
        # A reference policy and a reward model, of whose passes nothing is kept.
        "scorers": Needs(2 * _FLOAT * (frozen + trained), layer, own.vocab_size),
    }

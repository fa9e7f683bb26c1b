"""Whether a model that was given can take its place in a run, seen from its config and tokenizer alone.

Token ids travel between the models of a run, and generators take the weights of every policy into one architecture.
"""

from __future__ import annotations

from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.models.hub import read_config
from rayrlhf.models.loading import check_vocabulary

_HEAD = "ForSequenceClassification"


def check_policy(path: str, base: str) -> None:
    """Check that the model at `path` can be a policy of a run that begins with the one at `base`.

    Args:
        path: a directory or a name on the hub.
        base: another one.

    Raises:
        UserError: it is a reward model, has another tokenizer, or weights of other shapes.
    """
    architecture, _ = _head(path)
    if _HEAD in architecture:
        raise UserError(f"model {path!r} is a reward model ({architecture}); give a language model")
    if path == base:
        return
    check_vocabulary(base, path, "model", "all policies of a run have one tokenizer")
    wanted, found = _shape(base), _shape(path)
    if wanted != found:
        name = next(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
        raise UserError(
            f"model {path!r} has {name} {found.get(name)} and {base!r}, with which the run begins, "
            f"{wanted.get(name)}; all policies of a run have one architecture"
        )


def check_reward_model(path: str, base: str, *, trained: bool) -> None:
    """Check that a reward or value model can be, or become, that of a run that begins with the model at `base`.

    Args:
        path: a directory or a name on the hub.
        base: another one.
        trained: whether the run trains it, so that it may be without a head.

    Raises:
        UserError: it reads other token ids, or has no head that gives one score.
    """
    architecture, labels = _head(path)
    if not trained and _HEAD not in architecture:
        raise UserError(
            f"model {path!r} is no reward model ({architecture or 'no architecture'} has no score); "
            "add reward_model to stages, which trains one from it"
        )
    if _HEAD in architecture and labels != 1:
        raise UserError(f"model {path!r} has a head of {labels} labels; a reward model has one scalar score")
    if trained:
        remedy = "set this key to null to begin with a model of the run's own"
    else:
        remedy = f"a model with a tokenizer of its own reads texts: rewards='[{{kind: model, path: {path}}}]'"
    check_vocabulary(base, path, remedy=remedy)


def _head(path: str) -> tuple[str, int]:
    """The class that a model was saved as, and how many outputs its head has if it has one."""
    config = read_config(path, None)
    return ", ".join(config.architectures or []), config.num_labels


def _shape(path: str) -> dict[str, Any]:
    """The numbers of a model's config on which the shapes of its weights depend."""
    config = read_config(path, None)
    text = config.get_text_config().to_dict()
    numbers = {
        name: value
        for name, value in text.items()
        if type(value) is int and not name.endswith("_token_id") and name != "num_labels"
    }
    return {"model_type": config.model_type, **numbers}

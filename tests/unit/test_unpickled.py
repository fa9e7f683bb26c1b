"""Nothing that comes from elsewhere is unpickled or run: a pickle is a program."""

from __future__ import annotations

import ast
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.rollouts.engine import Engine
from rayrlhf.config_resources import GeneratorConfig
from rayrlhf.errors import UserError
from rayrlhf.models.classifier import Classifier, inspect_classifier
from rayrlhf.models.loading import load_policy, load_reward_model, resolve_model

ROOT = Path(__file__).parents[2]
TINY = Path(resolve_model("embedded:opt-tiny"))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.sprung,)


LOADERS: dict[str, Callable[[str], object]] = {
    "the check of a path": resolve_model,
    "a policy": load_policy,
    "a reward model": lambda path: load_reward_model(path, fresh_head_seed=0),
    "the look at a reward model": lambda path: inspect_classifier(path, None, None),
    "a reward model of others": lambda path: Classifier(
        path, None, 0, dtype="float32", device="cpu", max_tokens=64
    ),
    "a generator": lambda path: Engine(
        path, revision=None, dtype="float32", max_model_len=64, settings=GeneratorConfig(), seed=0
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's directory with pickled weights under every usual name and without safetensors, and what they make."""
    directory, sprung = tmp_path_factory.mktemp("pickled") / "model", tmp_path_factory.mktemp("trap") / "sprung"
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt"):
        torch.save({"weight": Trap(sprung)}, directory / name)
    torch.load(directory / "pytorch_model.bin", weights_only=False)
    assert sprung.exists(), "the trap does not work"
    sprung.unlink()
    return directory, sprung


@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_of_pickled_weights_is_refused_and_not_read(loader: str, pickled: tuple[Path, Path]) -> None:
    directory, sprung = pickled
    with pytest.raises(UserError, match=r"no (\*\.)?safetensors .*save_pretrained first") as raised:
        LOADERS[loader](str(directory))
    assert not sprung.exists()
    assert "\n" not in str(raised.value) and str(directory) in str(raised.value)


def test_a_checkpoint_that_somebody_else_has_put_there(tmp_path: Path) -> None:
    """As the loops read theirs."""
    torch.save({"step": Trap(tmp_path / "sprung")}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "state.pt", weights_only=True)
    assert not (tmp_path / "sprung").exists()


UNPICKLED = {
    "actors/pools/remote.py": {"pickle.loads"},  # messages between the actors of a run, which Ray carries
    "rayrlhf/trajectory.py": {"pickle.loads"},  # the same
    "rayrlhf/data/spool.py": {"pickle.loads"},  # a temporary file of this process, which nobody else may open
    "rayrlhf/data/stored.py": {"pickle.Unpickler"},  # takes numbers and dates alone (tests/unit/test_data_cache.py)
    "rayrlhf/plugins.py": {"exec"},  # a file that the user's config names
}
DANGEROUS = {
    *("pickle.loads", "pickle.load", "pickle.Unpickler", "cloudpickle.loads", "cloudpickle.load", "marshal.loads"),
    *("shelve.open", "joblib.load", "dill.loads", "dill.load", "pandas.read_pickle", "pd.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "exec", "os.system", "os.popen"),
}


def named(node: ast.expr) -> str:
    """`pickle.loads`."""
    return f"{named(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def test_what_could_run_a_text_stands_where_the_table_says() -> None:
    found: dict[str, set[str]] = {}
    for package in ("rayrlhf", "actors", "jobs"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])eval\(", text), file
            if not any(name in text for name in DANGEROUS):
                continue
            tree = ast.parse(text)
            uses = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            uses += [base for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases]
            if dangerous := {named(use) for use in uses} & DANGEROUS:
                found[str(file.relative_to(ROOT))] = dangerous
    assert found == UNPICKLED


def test_every_reader_of_tensors_and_arrays_is_told_to_unpickle_nothing() -> None:
    calls = 0
    for file in [each for folder in ("rayrlhf", "actors", "jobs", "scripts") for each in (ROOT / folder).rglob("*.py")]:
        text = file.read_text(encoding="utf-8")
        words = ("torch.load", "allow_pickle", "trust_remote_code")
        for node in ast.walk(ast.parse(text)) if any(word in text for word in words) else ():
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("allow_pickle", "False") == "False", f"{file}:{node.lineno}"
            assert given.get("trust_remote_code", "False") == "False", f"{file}:{node.lineno}"
            if named(node.func) == "torch.load":
                calls += 1
                assert given.get("weights_only") == "True", f"{file}:{node.lineno}"
    assert calls == 2

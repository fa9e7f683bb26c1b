"""A user's mistake is one line that says what, where and how to mend it; exit code 2; nothing looks finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.guard import guarded
from jobs.pipeline import pipeline
from jobs.reward_model import reward_model
from jobs.rl import rl
from jobs.stage import StageFunction, run
from rayrlhf.config_file import load_config
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
TINY = Path(resolve_model("embedded:opt-tiny"))
POST = {"subreddit": "tifu", "title": "a cat", "post": "My cat slept all day long.", "summary": "The cat slept."}

Mistake = Callable[..., str]


@pytest.fixture
def mistake(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Mistake:
    """Runs stages of the quick start with overrides; returns the one line on standard error, the rest is checked."""

    def make(
        *overrides: str, stages: Sequence[StageFunction] = (pipeline,), local: bool = True, done: Sequence[str] = ()
    ) -> str:
        settings = ["name=bad", f"runs_dir={tmp_path / 'runs'}", *overrides]
        code = guarded(lambda: run(load_config(QUICKSTART, settings), stages, local))
        out, err = capfd.readouterr()
        assert code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert "Traceback" not in out
        left = {path.name for path in (tmp_path / "runs" / "bad").glob("*")}
        assert left <= {".lock", "config.yaml", "contents.json", "outputs.json", *done}, f"the run folder holds {left}"
        return err

    return make


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def posts(count: int = 40) -> list[dict[str, str]]:
    return [POST | {"id": f"post-{i}", "post": f"My cat {i} slept all day long."} for i in range(count)]


def copy_of_tiny(directory: Path) -> Path:
    shutil.copytree(TINY, directory)
    return directory


# ---- the config


def test_unknown_key(mistake: Mistake, tmp_path: Path) -> None:
    assert "unknown key 'rl.step'; did you mean 'steps'?" in mistake("rl.step=3")
    assert not (tmp_path / "runs").exists()


def test_wrong_type(mistake: Mistake, tmp_path: Path) -> None:
    line = mistake("rl.steps=many")
    assert "'rl.steps'" in line and "integer" in line and "'many'" in line
    assert "'resources.generators.cpus'" in mistake("resources.generators.cpus=-1")
    assert "'sft'" in mistake("sft=3")
    assert not (tmp_path / "runs").exists()


def test_no_config_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: run(load_config("configs/none.yaml"), [pipeline], True)) == 2
    assert capfd.readouterr().err == "error: configs/none.yaml: no such config file; the examples are in configs/\n"


# ---- the data


def test_missing_data_file(mistake: Mistake, tmp_path: Path) -> None:
    path = tmp_path / "nothing.jsonl"
    assert f"{path}: no such file" in mistake(f"data.demonstrations.path={path}")


def test_empty_data_file(mistake: Mistake, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "empty.jsonl", [])
    assert f"{path}: the file holds no rows" in mistake(f"data.demonstrations.path={path}")


def test_row_without_prompt(mistake: Mistake, tmp_path: Path) -> None:
    rows = [*posts(), {**POST, "post": "  "}]
    path = jsonl(tmp_path / "posts.jsonl", rows)
    assert f"{path} line 41: 'post' is empty; fill it in or remove the row" in mistake(
        f"data.demonstrations.path={path}"
    )
    path = jsonl(tmp_path / "own.jsonl", [{"prompt": "Hi", "response": "Hello"}, {"response": "Hello"}])
    line = mistake(f"data.demonstrations.path={path}", "data.demonstrations.format=prompts")
    assert f"{path} line 2: no 'prompt' (text) or 'messages'; there are: response" in line


def test_line_that_is_not_json(mistake: Mistake, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(POST) + "\n{'post': 1}\n")
    assert f"{path} line 2: not valid JSON" in mistake(f"data.demonstrations.path={path}")


def test_pairs_that_are_all_identical(mistake: Mistake, tmp_path: Path) -> None:
    same = "the cat slept for the whole day"
    path = jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": f"post {i}", "chosen": same, "rejected": same} for i in range(30)]
    )
    copy_of_tiny(tmp_path / "runs" / "bad" / "sft")
    line = mistake(
        "data.comparisons.format=prompts",
        f"data.comparisons.path={path}",
        stages=[reward_model],
        done=["sft"],
    )
    assert f"{path}: no usable comparison" in line and "identical" in line


# ---- the models


def test_model_directory_without_weights(mistake: Mistake, tmp_path: Path) -> None:
    directory = copy_of_tiny(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    line = mistake(f"model.path={directory}")
    assert f"model '{directory}': no *.safetensors file" in line


def test_no_such_model(mistake: Mistake, tmp_path: Path) -> None:
    assert f"model '{tmp_path}/none': no such directory" in mistake(f"model.path={tmp_path}/none")


def test_prompt_and_response_beyond_the_context(mistake: Mistake) -> None:
    line = mistake("data.max_prompt_tokens=740", "data.max_response_tokens=48")
    assert "740 + 48 = 788 exceeds the model's context of 768 tokens" in line


def test_reward_model_with_another_vocabulary(mistake: Mistake, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "bad"
    policy = copy_of_tiny(folder / "sft")
    reward = load_reward_model(str(policy), fresh_head_seed=0)
    other = load_tokenizer(str(policy))
    other.add_tokens(["zebra-crossing"])
    reward.resize_token_embeddings(len(other))
    save_model(reward, other, folder / "reward_model")
    line = mistake(stages=[rl], done=["sft", "reward_model"])
    assert "different tokenizers" in line and "zebra-crossing" in line and str(folder / "reward_model") in line


# ---- the run folder and the cluster


def test_run_folder_of_another_config(mistake: Mistake, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "bad"
    copy_of_tiny(folder / "sft")
    mistake("seed=0", stages=[rl], done=["sft"])  # needs a reward model; stores the config
    line = mistake("seed=1", done=["sft"])
    assert f"{folder / 'config.yaml'}: seed was 0 and is now 1, but stage 'sft' is already done" in line
    assert line.endswith("or begin another run: name=OTHER\n")


def test_stage_before_its_time(mistake: Mistake, tmp_path: Path) -> None:
    copy_of_tiny(tmp_path / "runs" / "bad" / "sft")
    line = mistake(stages=[rl], done=["sft"])
    assert f"stage 'rl' needs {tmp_path}/runs/bad/reward_model, which stage 'reward_model' writes" in line


def test_cluster_that_is_too_small(mistake: Mistake) -> None:
    """Said before anything is scheduled, in place of waiting for ever."""
    resources = ["resources.generators.count=64", "resources.generators.cpus=1", "resources.dashboard=false"]
    line = mistake(*resources, local=False)
    assert "resources.generators: " in line and " of 64 (each 1 CPUs) fit nowhere" in line
    assert "lower resources.generators.count" in line


@pytest.mark.parametrize("module", ["jobs.cli", "jobs.sft"])
def test_the_commands_exit_with_2(start: Any, tmp_path: Path, module: str) -> None:
    arguments = ["sft"] if module == "jobs.cli" else ["--config"]
    outcome = start("python", "-m", module, *arguments, str(QUICKSTART), f"runs_dir={tmp_path}", "sft.epoch=1").wait()
    assert outcome.code == 2
    assert outcome.err == f"error: {QUICKSTART}: unknown key 'sft.epoch'; did you mean 'epochs'?\n"
    assert outcome.out == "" and not any(tmp_path.iterdir())

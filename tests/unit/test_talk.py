"""`rayrlhf chat`, and the same from Python: whose answers, to what, and what they are worth."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pexpect
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import jobs.chat
import rayrlhf
from jobs.answers import Answering
from jobs.chat import Dialogue, columns, lines
from jobs.cli import app
from rayrlhf.data.rows import Row
from rayrlhf.data.tokens import decode_response, encode_prompt
from rayrlhf.errors import UserError
from rayrlhf.models.answering import read_together
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import load_policy, load_reward_model, load_tokenizer, resolve_model
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.models import chosen, open_run, policies_of
from tests.finished import POST, finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def answering(run: RunFolder) -> Answering:
    return Answering(run, chosen(run, None), score=True)


@pytest.fixture
def dialogue(answering: Answering) -> Dialogue:
    return Dialogue(answering, 0, Console(file=io.StringIO(), width=200))


def said(dialogue: Dialogue) -> str:
    out = dialogue.out.file
    assert isinstance(out, io.StringIO)
    return out.getvalue()


def greedy(model: Path, ids: list[int], longest: int = 8) -> list[int]:
    """The likeliest tokens of a model, by a plain loop."""
    policy, written = load_policy(str(model)), list(ids)
    with torch.no_grad():
        while len(written) < len(ids) + longest and (len(written) == len(ids) or written[-1] != 2):
            written.append(int(policy(torch.tensor([written])).logits[0, -1].argmax()))
    return written[len(ids) :]


def test_models_of_a_run_by_name(run: RunFolder) -> None:
    found = policies_of(run)
    assert found == {"base": resolve_model("embedded:opt-tiny"), "sft": str(run.sft), "policy": str(run.policy)}
    assert list(chosen(run, None)) == ["sft", "policy"] and list(chosen(run, "policy, base")) == ["policy", "base"]
    with pytest.raises(UserError, match="has no model 'dpo'; it has: base, sft, policy"):
        chosen(run, "sft,dpo")
    with pytest.raises(UserError, match="nowhere: no run folder"):
        open_run("nowhere")


def test_a_question_gets_what_each_model_finds_likeliest_and_its_score(run: RunFolder, dialogue: Dialogue) -> None:
    """Text and score by plain transformers and the run's own scoring function."""
    for typed in ("/temp 0", "/example 1"):
        assert dialogue.take(typed)
    tokenizer = load_tokenizer(str(run.sft))
    ids = encode_prompt(tokenizer, POST)
    reward = Forward(load_reward_model(str(run.reward_model)), pad_token_id=1, max_tokens=4096, dtype="float32")
    shown = said(dialogue)
    for name, model in (("sft", run.sft), ("policy", run.policy)):
        response = greedy(model, ids)
        (score,) = reward.row_scores([Row.completion(ids, response)])
        assert f"{name} ({score:.3f}): {decode_response(tokenizer, response)}" in shown
    assert POST in shown and "reference: A dog ate homework." in shown


def test_seeds_repeat_answers(dialogue: Dialogue) -> None:
    for typed in ("/temp 1", "/seed 7", "/example 2", "/example 2", "/seed 7", "/example 2"):
        dialogue.take(typed)
    answers = [line for line in said(dialogue).splitlines() if line.startswith("policy (")]
    assert answers[0] == answers[2] != answers[1]


def test_what_is_typed_is_framed_as_the_runs_prompts_are(run: RunFolder, dialogue: Dialogue) -> None:
    """The run's are posts, so this one has neither history nor anything of the line before."""
    assert dialogue.answering.typist.template == "post"
    for typed in ("/temp 0", "He ate it.", "He ate it."):
        dialogue.take(typed)
    answers = [line for line in said(dialogue).splitlines() if line.startswith("sft (")]
    ids = encode_prompt(dialogue.answering.tokenizer, "SUBREDDIT: r/AskReddit\n\nTITLE: \n\nPOST: He ate it.\n\nTL;DR:")
    text = decode_response(dialogue.answering.tokenizer, greedy(run.sft, ids))
    assert len(answers) == 2 and answers[0] == answers[1] and answers[0].endswith(f"): {text}")


def test_each_model_keeps_a_dialogue_of_its_own(run: RunFolder) -> None:
    talking = Dialogue(
        Answering(run, chosen(run, None), template="chat", temperature=0.0), 0, Console(file=io.StringIO(), width=200)
    )
    for typed in ("/system Be brief.", "Hi", "Why?"):
        talking.take(typed)
    assert [m.role for m in talking.said["sft"]] == ["user", "assistant", "user", "assistant"]
    tokenizer = talking.answering.tokenizer
    for name, model in (("sft", run.sft), ("policy", run.policy)):
        first, second = (m.content for m in talking.said[name] if m.role == "assistant")
        before = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:"
        assert first == decode_response(tokenizer, greedy(model, encode_prompt(tokenizer, before)))
        whole = f"{before} {first}\n\nHuman: Why?\n\nAssistant:"
        assert second == decode_response(tokenizer, greedy(model, encode_prompt(tokenizer, whole)))
    talking.take("/reset")
    assert talking.said == {"sft": [], "policy": []}


def test_mistakes_are_said_and_the_dialogue_goes_on(dialogue: Dialogue) -> None:
    for typed, words in (
        ("/temp hot", "/temp takes a number of 0 or more"),
        ("/temp -1", "/temp takes a number of 0 or more"),
        ("/seed 1.5", "/seed takes a whole number"),
        ("/example 3", "/example takes a number from 1 to 2"),
        ("/nope", "no command /nope; /help lists them"),
    ):
        assert dialogue.take(typed)
        assert words in said(dialogue).splitlines()[-1]
    assert dialogue.take("") and dialogue.take("/help") and "/reset" in said(dialogue)
    assert not dialogue.take("/quit")


def test_options_are_checked_before_models_are_loaded(run: RunFolder) -> None:
    for options, words in (
        ({"template": "poem"}, "--template 'poem' must be one of chat, post, text"),
        ({"temperature": -1.0}, "--temperature must be 0 or more"),
        ({"max_tokens": 0}, "--max-tokens 1 or more"),
        ({"max_tokens": 5000}, "1024"),
    ):
        with pytest.raises(UserError, match=words):
            Answering(run, chosen(run, None), **options)


def test_a_run_without_reward_model_has_no_scores(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    run.remove(run.reward_model)
    with pytest.raises(UserError, match="has no reward model"):
        Answering(run, chosen(run, None), score=True)


def test_a_line_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\\\ntwo\nthree\n\nfour\\\n"))
    assert list(lines()) == ["one\ntwo", "three", "", "four\n"]


def test_answers_stand_side_by_side_in_a_terminal() -> None:
    out = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    out.print(columns({"sft": " a short one", "policy": "another [b]answer[/b]"}, {"policy": "0.123"}))
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    assert any("a short one" in line and "another [b]answer[/b]" in line for line in text.splitlines())
    assert "policy  reward 0.123" in text


def test_ctrl_c_stops_the_answer_and_not_the_dialogue(dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with the first piece of text (test_answering has it come in the middle of what models write)."""
    plain = read_together

    def interrupted(answers: Any, show: Any) -> None:
        def first(name: str, piece: str) -> None:
            show(name, "so far")
            raise KeyboardInterrupt

        plain(answers, first)

    monkeypatch.setattr(jobs.chat, "read_together", interrupted)
    assert dialogue.take("/example 1")
    shown = said(dialogue)
    assert ": so far\n" in shown and "stopped\n" in shown
    monkeypatch.undo()
    assert dialogue.take("/example 1") and said(dialogue).count("stopped") == 1


def test_the_command_reads_a_pipe(run: RunFolder) -> None:
    arguments = ["chat", str(run.path), "--models", "policy", "--max-tokens", "4", "--temperature", "0"]
    done = CliRunner().invoke(app, arguments, input="He ate it.\n/quit\nnever\n")
    assert done.exit_code == 0, done.output
    first, *answers = done.stdout.splitlines()
    assert first.startswith("one: policy. What is typed is a post to be summed up")
    assert len(answers) == 1 and answers[0].startswith("policy: ")


# It starts a process, which imports torch again; the tests above have its parts.
@pytest.mark.long
def test_the_command_in_a_terminal(run: RunFolder) -> None:
    """Answers side by side; Ctrl-C at the prompt says how to end, and Ctrl-D ends."""
    arguments = ["-m", "jobs.cli", "chat", str(run.path), "--max-tokens", "4"]
    root = str(Path(__file__).parents[2])
    child = pexpect.spawn(sys.executable, arguments, cwd=root, encoding="utf-8", timeout=600, dimensions=(40, 100))
    child.expect_exact("/help lists commands.")
    child.expect_exact("> ")
    child.sendline("He ate it.")
    child.expect(r"sft[^\n]*policy")
    child.expect_exact("> ")
    child.sendintr()
    child.expect_exact("/quit or Ctrl-D ends")
    child.expect_exact("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


# ---- the same from Python


def test_a_run_as_data_frames(run: RunFolder) -> None:
    found = rayrlhf.Run(run.path)
    assert found.config.data.max_response_tokens == 8 and list(found.models) == ["base", "sft", "policy"]
    assert found.evaluation.loc[("policy", "gold"), "mean"] == 0.375
    assert found.evaluation.loc[("policy", "kl"), ["low", "high"]].tolist() == [0.125, 0.5]
    assert ("sft", "kl") not in found.evaluation.index  # which was not measured
    assert found.differences.loc[("policy_minus_sft", "gold"), "p"] == 0.5
    assert found.samples["policy"].tolist() == ["p", "q"] and found.comparisons["prompt"].tolist() == [POST]
    metrics = found.metrics
    assert metrics[metrics.stage == "rl"]["rl/loss"].tolist() == [1.0, 2.0]
    assert metrics[metrics.stage == "sft"]["rl/loss"].isna().all()
    run.comparisons.rename(run.path / "away")
    with pytest.raises(UserError, match="has no comparisons.parquet"):
        _ = found.comparisons
    (run.path / "away").rename(run.comparisons)


def test_answers_as_a_data_frame(run: RunFolder) -> None:
    found = rayrlhf.Run(run.path).generate(["He ate it.", "She slept."], temperature=0.0, score=True)
    assert isinstance(found, pd.DataFrame)
    assert list(found) == ["prompt", "sft", "policy", "sft_reward", "policy_reward"]
    tokenizer = load_tokenizer(str(run.sft))
    ids = encode_prompt(tokenizer, "SUBREDDIT: r/AskReddit\n\nTITLE: \n\nPOST: She slept.\n\nTL;DR:")
    assert found.policy[1] == decode_response(tokenizer, greedy(run.policy, ids))


def test_importing_the_package_costs_nothing() -> None:
    code = (
        "import sys, rayrlhf; assert {'run', 'Run', 'load_config'} <= set(dir(rayrlhf)); "
        "print(sorted({'torch', 'ray', 'pandas', 'numpy', 'pydantic', 'yaml'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="has no attribute 'walk'"):
        _ = rayrlhf.walk


def test_from_python_a_run_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages themselves are tested as whole runs; here a run whose stages are all done."""
    given: dict[str, Any] = {}
    run = finished_run(tmp_path)

    def recorded(config: Any, local: bool) -> None:
        given.update(config=config, local=local)

    monkeypatch.setattr("jobs.pipeline.run_all", recorded)
    config = rayrlhf.load_config(run.config)
    assert rayrlhf.run(config, local=True).folder.path == run.path
    assert given == {"config": config, "local": True}

"""Responses in turns: environments of these tests, and an engine that writes what they say in place of vLLM."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from actors.rollouts.episodes import Episodes
from rayrlhf.config_environment import EnvironmentConfig
from rayrlhf.config_file import parse_config
from rayrlhf.config_rl import PPOConfig
from rayrlhf.data.rows import Row
from rayrlhf.data.tokens import decode_trajectory
from rayrlhf.environments.base import EnvironmentMaker, Turn
from rayrlhf.environments.guess import Guess
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.trajectory import GenerationRequest, Minimum, Sampling, SerializedTrajectory, Trajectory, derive_seed
from tests.tiny import forward_of, tiny_models, trainer_of

PAGE = Path(__file__).parents[2] / "docs/extending.md"
EOS = 2
TOKENIZER = load_tokenizer(resolve_model("embedded:opt-tiny"))
SAMPLING = Sampling(1.0, 30, EOS, max_turns=3)
Write = Callable[[GenerationRequest], list[int]]


@dataclass
class Scripted:
    """An engine that finishes all its turns in one step: each is what `write` says of its request."""

    write: Write
    asked: list[tuple[GenerationRequest, Sampling, int]] = field(default_factory=list)
    waiting: dict[int, tuple[GenerationRequest, Sampling, int]] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        return len(self.waiting)

    def add(self, requests: Mapping[int, GenerationRequest], sampling: Sampling, version: int) -> None:
        for ticket, request in requests.items():
            self.waiting[ticket] = (request, sampling, version)
            self.asked.append(self.waiting[ticket])

    def step(self) -> dict[int, Trajectory]:
        done = {}
        for ticket, (request, sampling, version) in self.waiting.items():
            ids = self.write(request)[: sampling.max_tokens]
            done[ticket] = Trajectory(
                request.prompt_id, request.sample_index, request.seed, np.array(request.prompt_ids), np.array(ids),
                -np.arange(1.0, len(ids) + 1, dtype=np.float32), np.full(len(ids), version),
                "eos" if ids[-1] == EOS else "length",
            )  # fmt: skip
        self.waiting = {}
        return done

    def abort(self) -> None:
        self.waiting = {}

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        pass


def ids_of(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found


def episodes(tmp_path: Path, source: str, write: Write, **settings: Any) -> Episodes:
    """With the class `Mine` of a file."""
    (tmp_path / "mine.py").write_text(source)
    maker = EnvironmentMaker.read(EnvironmentConfig(path=f"{tmp_path / 'mine.py'}:Mine", **settings))
    assert maker
    return Episodes(Scripted(write), pickle.loads(pickle.dumps(maker)), TOKENIZER)


def play(rollout: Episodes, *requests: GenerationRequest, sampling: Sampling = SAMPLING) -> list[Trajectory]:
    rollout.add(dict(enumerate(requests)), sampling, 5)
    done: dict[int, Trajectory] = {}
    while rollout.in_flight:
        done |= rollout.step()
    return [done[i] for i in range(len(requests))]


COUNTING = """
from rayrlhf.environments.base import Turn

class Mine:
    def __init__(self, until=3):
        self.until = until

    def reset(self, prompt, reference, seed):
        self.said, self.told = [], (prompt, reference, seed)

    def step(self, text, token_ids):
        self.said.append((text, token_ids))
        return Turn(f" {len(self.said)} so far.", 0.25, len(self.said) == self.until)
"""
REQUEST = GenerationRequest("p", (EOS, 100, 101), 1, 77, "the prompt", "the reference")


def hello(request: GenerationRequest) -> list[int]:
    return [*ids_of(" hello"), EOS]


def test_a_trajectory_is_turns_and_observations(tmp_path: Path) -> None:
    rollout = episodes(tmp_path, COUNTING, hello)
    (found,) = play(rollout, REQUEST)
    said = [*ids_of(" hello"), EOS]
    observed = [ids_of(" 1 so far."), ids_of(" 2 so far.")]
    assert found.response_ids.tolist() == [*said, *observed[0], *said, *observed[1], *said]
    assert found.prompt_ids.tolist() == list(REQUEST.prompt_ids)
    expected = [True] * len(said) + [False] * len(observed[0])
    expected += [True] * len(said) + [False] * len(observed[1]) + [True] * len(said)
    assert found.written is not None and found.written.tolist() == expected
    assert found.generator_logprobs.tolist() == [-1.0 - i for i in range(len(said))] * 3
    assert found.versions.tolist() == [5] * 3 * len(said) and found.written_tokens == 3 * len(said)
    assert (found.turns, found.environment_reward, found.finish_reason) == (3, 0.75, "eos")
    assert decode_trajectory(TOKENIZER, found) == "hello 1 so far. hello 2 so far. hello"
    # Each turn has the ids of all before it, a seed of its own, and what is left of the room.
    engine = rollout.engine
    assert isinstance(engine, Scripted)
    (first, _, _), (second, sampling, _), _ = engine.asked
    assert first == REQUEST
    assert second == replace(
        REQUEST, prompt_ids=(*REQUEST.prompt_ids, *said, *observed[0]), seed=derive_seed(77, "turn", 1)
    )
    assert sampling == replace(SAMPLING, max_tokens=30 - len(said) - len(observed[0]))


def test_every_turn_has_its_least_length(tmp_path: Path) -> None:
    (found,) = play(episodes(tmp_path, COUNTING, hello), REQUEST, sampling=replace(SAMPLING, min_tokens=2))
    assert found.minimum == Minimum(2, (EOS,))
    turn = len(hello(REQUEST))
    assert turn > 2
    expected = [[start + i, EOS] for start in (0, turn, 2 * turn) for i in range(2)]
    assert Row.of(found).barred.tolist() == expected


def test_only_what_the_policy_wrote_is_predicted_and_travels(tmp_path: Path) -> None:
    (found,) = play(episodes(tmp_path, COUNTING, hello), REQUEST)
    row = Row.of(found)
    assert row.ids.tolist() == found.token_ids.tolist() and int(row.mask.sum()) == found.written_tokens
    assert not row.mask[: len(found.prompt_ids)].any() and row.prompt == 3
    found.ref_logprobs = found.generator_logprobs - 1
    sent = SerializedTrajectory.of(found)
    assert (sent.written_tokens, sent.turns, sent.length) == (found.written_tokens, 3, found.length)
    again = sent.load()
    for name in ("prompt_ids", "response_ids", "generator_logprobs", "versions", "ref_logprobs", "written"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert (again.turns, again.environment_reward) == (3, 0.75)


@pytest.mark.parametrize("max_tokens", [1, 4096])
def test_logprobs_and_advantages_are_of_the_policys_tokens(tmp_path: Path, max_tokens: int) -> None:
    """Against transformers over the whole sequence; an advantage carries over the observation from turn to turn."""
    policy, value_model = tiny_models()

    def short(request: GenerationRequest) -> list[int]:
        return [10 + len(request.prompt_ids) % 7, EOS]

    silent = COUNTING.replace('f" {len(self.said)} so far."', "[20, 21, 22]")
    found = play(episodes(tmp_path, silent, short), *(replace(REQUEST, prompt_ids=(EOS, *[5] * i)) for i in (1, 4)))
    rows = [Row.of(t) for t in found]
    ours = forward_of(policy, max_tokens).row_logprobs(rows)
    for t, own in zip(found, ours, strict=True):
        with torch.no_grad():
            logprobs = policy(torch.tensor(t.token_ids)[None]).logits[0].log_softmax(-1)
        assert t.written is not None
        places = [len(t.prompt_ids) + i for i in np.flatnonzero(t.written)]
        expected = torch.stack([logprobs[place - 1, t.token_ids[place]] for place in places])
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
        t.ref_logprobs, t.rewards = own.numpy(), {"environment": 2.0}
    settings = PPOConfig(temperature=1.0, whiten_advantages=False, gamma=1.0, lam=1.0, micro_batch_tokens=max_tokens)
    trainer = trainer_of(policy, value_model, settings)
    experience, _ = trainer.make_experience(found)
    for each in experience:
        assert each.fixed.old_values is not None
        # With gamma = lambda = 1 the advantage of every token is all that is still to come less its value.
        torch.testing.assert_close(each.fixed.advantages, 2.0 - each.fixed.old_values, rtol=1e-4, atol=1e-4)
        assert len(each.fixed.advantages) == 6


def test_it_ends_by_turns_by_room_and_in_the_middle_of_a_turn(tmp_path: Path) -> None:
    never = {"until": 100}
    (by_turns,) = play(episodes(tmp_path, COUNTING, hello, settings=never), REQUEST)
    assert (by_turns.turns, by_turns.finish_reason) == (3, "eos")
    short = replace(SAMPLING, max_tokens=len(hello(REQUEST)) + len(ids_of(" 1 so far.")))
    (by_room,) = play(episodes(tmp_path, COUNTING, hello, settings=never), REQUEST, sampling=short)
    assert by_room.response_ids.tolist() == hello(REQUEST), "an observation that nobody answers is left out"
    assert (by_room.turns, by_room.finish_reason, by_room.environment_reward) == (1, "length", 0.25)
    (cut,) = play(episodes(tmp_path, COUNTING, lambda request: [100] * 99), REQUEST)
    assert (cut.turns, cut.finish_reason, cut.environment_reward) == (1, "length", 0.0)
    assert cut.response_ids.tolist() == [100] * 30


def test_one_turn_goes_past_the_environment(tmp_path: Path) -> None:
    (found,) = play(episodes(tmp_path, COUNTING, hello), REQUEST, sampling=replace(SAMPLING, max_turns=1))
    assert found.written is None and found.environment_reward is None and found.turns == 1


def test_answers_come_in_any_order(tmp_path: Path) -> None:
    """The first trajectory's answer waits until the second trajectory has had all of its own."""
    waits = """
import tests.unit.test_episodes as here
class Mine:
    def reset(self, prompt, reference, seed):
        self.prompt = prompt
        self.turn = 0
    def step(self, text, token_ids):
        self.turn += 1
        if self.prompt == "slow":
            assert here.FAST_IS_DONE.wait(600)
        if self.prompt == "fast" and self.turn == 3:
            here.FAST_IS_DONE.set()
        return f" {self.prompt}", 1.0, False
"""
    FAST_IS_DONE.clear()
    slow, fast = (replace(REQUEST, prompt=name, prompt_id=name) for name in ("slow", "fast"))
    found = play(episodes(tmp_path, waits, hello), slow, fast)
    assert [t.prompt_id for t in found] == ["slow", "fast"] and [t.turns for t in found] == [3, 3]
    assert "slow" in decode_trajectory(TOKENIZER, found[0]) and "fast" not in decode_trajectory(TOKENIZER, found[0])


FAST_IS_DONE, NEVER = threading.Event(), threading.Event()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('lost')", "KeyError: 'lost'"),
        ("return 7", "TypeError"),
        ("return ' x', float('nan'), False", "its reward is nan"),
        ("import tests.unit.test_episodes as here; here.NEVER.wait(600)", "no answer for 1 s"),
    ],
)
def test_what_an_environment_does_wrong_is_one_line(tmp_path: Path, body: str, said: str) -> None:
    source = f"class Mine:\n    def reset(self, *told): pass\n    def step(self, text, token_ids):\n        {body}\n"
    NEVER.clear()
    with pytest.raises(UserError) as raised:
        # Only where it is too late on purpose: a busy machine may need a second for an answer that comes at once.
        play(episodes(tmp_path, source, hello, step_timeout_s=1 if "NEVER" in body else 600), REQUEST)
    NEVER.set()  # the end of this process would wait for the thread
    message = str(raised.value)
    assert said in message and "mine.py:Mine, prompt 'p', sample 1, turn 1" in message and "\n" not in message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Other: pass", "has no 'Mine'"),
        ("class Mine:\n    def reset(self): pass", "has no method step"),
        ("class Mine:\n    def __init__(self, needed): pass", "cannot be made: TypeError"),
    ],
)
def test_a_class_that_does_not_fit_is_found_before_anything_starts(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        episodes(tmp_path, source, hello)


def test_the_config_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="kind environment needs the section environment"):
        parse_config({"name": "one", "rewards": [{"kind": "environment"}]}, "test")
    with pytest.raises(UserError, match="one reward of kind environment at most"):
        game = {"path": "rayrlhf.environments.guess:Guess"}
        twice = [{"kind": "environment"}, {"kind": "environment", "name": "again"}]
        parse_config({"name": "one", "environment": game, "rewards": twice}, "test")


def test_the_guessing_game() -> None:
    game = Guess()
    game.reset("", "5", 0)
    assert game.step("4", []) == Turn(" Higher. Guess:", 0.0, False)
    assert game.step("it is 6", []) == Turn(" Lower. Guess:", 0.0, False)
    assert game.step("5", []) == Turn("", 1.0, True)
    assert game.step("no idea", []) == Turn("", 0.0, True)


def test_the_environment_of_the_page(tmp_path: Path) -> None:
    recipe = PAGE.read_text(encoding="utf-8").split("## An environment\n")[1].split("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)[0]
    section = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", recipe, re.DOTALL)[0])
    file = tmp_path / "calculator.py"
    file.write_text(code)
    section["environment"]["path"] = f"{file}:Calculator"
    config = parse_config({"name": "run", **section}, "test")
    maker = EnvironmentMaker.read(config.environment)
    assert maker

    def write(request: GenerationRequest) -> list[int]:
        asked = "12" in TOKENIZER.decode(request.prompt_ids)
        return [*ids_of("12" if asked else "3*4="), EOS]

    (found,) = play(Episodes(Scripted(write), maker, TOKENIZER), replace(REQUEST, reference="12"))
    assert decode_trajectory(TOKENIZER, found) == "3*4= 12\nAnswer:12"
    assert (found.turns, found.environment_reward, found.finish_reason) == (2, 1.0, "eos")

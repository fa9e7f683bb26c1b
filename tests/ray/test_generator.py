"""Real vLLM against transformers: the same log-probs after every sync, and never a response of other weights.

Three engines in all, because each takes tens of seconds to start: the embedded model (OPT, tied head) and a random
untied OPT with hardly any KV cache in this process, and a random tied Qwen2 as a Ray actor. The vocabulary of the
random models is no multiple of 64, so that vLLM pads their embeddings.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import rayrlhf
from actors.pools.pool import Pool
from actors.pools.remote import ActorFailure, Remote
from actors.rollouts.engine import environment_variables
from actors.rollouts.generator import Generator
from actors.rollouts.in_turn import generate
from actors.rollouts.weight_sync import WeightSyncError, publish, publish_directory
from rayrlhf.config import ModelConfig
from rayrlhf.config_resources import GeneratorConfig
from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.batching import collate
from rayrlhf.models.checks import HEAD_SIZES
from rayrlhf.models.logprobs import token_logprobs
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory, Trajectory, Truncation
from tests.leftovers import held, named

EMBEDDED = Path(rayrlhf.__file__).parent / "assets" / "opt-tiny"
TOLERANCE = 1e-4
MAX_LENGTH = 192
NEVER = 0
"""An id that these models hardly ever sample, as EOS of responses that shall run to their full length."""
MANY = tuple(range(3, 103))
"""Ids that these models often sample, as stop tokens."""


def _perturbed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy whose distribution is far from the original's, in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            scale = parameter.std().clamp_min(0.02) if parameter.numel() > 1 else torch.tensor(0.02)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale * 0.5)
    return changed


def _reference_logprobs(model: PreTrainedModel, trajectory: Trajectory, temperature: float) -> NDArray[np.float32]:
    """[R] by transformers, in float32, without the ends where none could be drawn."""
    ids = torch.from_numpy(trajectory.token_ids)
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(trajectory.prompt_ids) - 1 : -1].float()
    if trajectory.minimum:
        for place in range(min(trajectory.minimum.tokens, len(logits))):
            logits[place, list(trajectory.minimum.ends)] = -torch.inf
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(1, ids[len(trajectory.prompt_ids) :, None])[:, 0].numpy()


def _gap(model: PreTrainedModel, trajectories: Sequence[Trajectory], temperature: float) -> float:
    """Largest difference of any sampled token's log-prob between generator and transformers, in nats."""
    return max(
        float(np.abs(t.generator_logprobs - _reference_logprobs(model, t, temperature)).max()) for t in trajectories
    )


def _requests(count: int, *, length: int, samples: int = 1, vocabulary: int = 1000) -> list[GenerationRequest]:
    """`count` samples of `count / samples` prompts of mixed lengths; the prompts contain id 2, OPT's BOS and EOS."""
    requests = []
    for i in range(count):
        prompt = i // samples
        generator = np.random.default_rng(prompt)
        ids = generator.integers(3, vocabulary, size=length + prompt % 5)
        ids[0] = ids[length // 2] = 2
        requests.append(GenerationRequest(f"prompt-{prompt}", tuple(int(x) for x in ids), i % samples, seed=1000 + i))
    return requests


def _sampling(temperature: float, max_tokens: int = 16, eos: int = NEVER) -> Sampling:
    return Sampling(temperature=temperature, max_tokens=max_tokens, eos_token_id=eos)


def _generate(
    generator: Generator | Remote, requests: Sequence[GenerationRequest], sampling: Sampling, version: int
) -> list[Trajectory]:
    """By the only generator of a pool."""
    actor = generator if isinstance(generator, Remote) else Remote(repr(generator), generator, True)
    pool = Pool("generator", 1, lambda name: actor, start_timeout_s=300, call_timeout_s=120)
    return [serialized.load() for serialized in generate(pool, requests, sampling, version)]


def _version(generator: Generator) -> int:
    return int(generator.stats()["version"])


def _sync(generator: Generator, model: PreTrainedModel) -> int:
    """Publish the model as the learner does, under the next version."""
    version = generator.load_weights(publish(model.named_parameters(), _version(generator) + 1, local=True))
    assert version == _version(generator)
    return version


def _untied_model() -> PreTrainedModel:
    torch.manual_seed(1)
    size = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=1000, num_attention_heads=2, max_position_embeddings=256, **size)
    config.tie_word_embeddings = False
    config.init_std = 0.2
    return OPTForCausalLM(config).eval()


def _tied_qwen2() -> PreTrainedModel:
    torch.manual_seed(2)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = Qwen2Config(vocab_size=1000, hidden_size=128, intermediate_size=192, max_position_embeddings=256, **heads)
    config.tie_word_embeddings = True
    config.initializer_range = 0.2
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def embedded() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tied() -> Iterator[Generator]:
    """Where a package has set that processes are spawned, as some plugins of vLLM do."""
    multiprocessing.set_start_method("spawn", force=True)
    model = ModelConfig(path=str(EMBEDDED))
    generator = Generator("generator-0", model, GeneratorConfig(threads=1, kv_cache_mib=64), MAX_LENGTH, 0)
    assert multiprocessing.get_start_method() == "spawn"
    multiprocessing.set_start_method(None, force=True)
    yield generator
    generator.engine.close()


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Generator, PreTrainedModel]]:
    """With 1 MiB of KV cache: 1024 tokens, so that eight long responses cannot be under way at once."""
    path = tmp_path_factory.mktemp("untied")
    model = _untied_model()
    model.save_pretrained(path)
    settings = GeneratorConfig(threads=1, kv_cache_mib=1)
    generator = Generator("generator-1", ModelConfig(path=str(path)), settings, MAX_LENGTH, 0)
    yield generator, model
    generator.engine.close()


def test_tied_weights_after_every_sync(tied: Generator, embedded: PreTrainedModel) -> None:
    # The same prompts every time: blocks of the previous weights' keys and values are in the prefix cache.
    requests = _requests(8, length=100, samples=2)
    for seed in range(3):
        model = _perturbed(embedded, seed)
        trajectories = _generate(tied, requests, _sampling(1.0), _sync(tied, model))
        assert _gap(embedded, trajectories, 1.0) > 1.0, "the weights must differ, or this test shows nothing"
        assert _gap(model, trajectories, 1.0) < TOLERANCE


def test_the_kill_of_a_generator_would_leave_nothing_in_shared_memory(tied: Generator) -> None:
    assert named(held([os.getpid()])) == set()


def test_untied_weights_after_every_sync(untied: tuple[Generator, PreTrainedModel]) -> None:
    generator, initial = untied
    requests = _requests(4, length=60, samples=2)
    for seed in range(3):
        model = _perturbed(initial, seed)
        trajectories = _generate(generator, requests, _sampling(1.0), _sync(generator, model))
        assert _gap(initial, trajectories, 1.0) > 1.0, "the weights must differ, or this test shows nothing"
        assert _gap(model, trajectories, 1.0) < TOLERANCE


def test_a_model_directory_can_be_published(tied: Generator, embedded: PreTrainedModel) -> None:
    _sync(tied, _perturbed(embedded, 9))
    version = tied.load_weights(publish_directory(EMBEDDED, _version(tied) + 1, local=True))
    assert _gap(embedded, _generate(tied, _requests(4, length=40), _sampling(1.0), version), 1.0) < TOLERANCE


def test_prompt_logprobs(tied: Generator, embedded: PreTrainedModel) -> None:
    _sync(tied, embedded)
    ids = list(_requests(1, length=80)[0].prompt_ids)
    with torch.no_grad():
        logprobs = torch.log_softmax(embedded(torch.tensor([ids])).logits[0, :-1].float(), dim=-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(tied.engine.prompt_logprobs(ids), expected, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.5, 0.7, 0.01])
def test_logprobs_are_of_the_sampling_temperature(
    tied: Generator, embedded: PreTrainedModel, temperature: float
) -> None:
    version = _sync(tied, embedded)
    requests = _requests(6, length=50)
    trajectories = _generate(tied, requests, _sampling(temperature), version)
    # Dividing the logits magnifies their rounding errors.
    tolerance = max(TOLERANCE, 2e-5 / temperature)
    assert _gap(embedded, trajectories, temperature) < tolerance
    # The learner's own pass, all rows in one padded batch.
    batch = collate([Row.completion(t.prompt_ids, t.response_ids) for t in trajectories], pad_token_id=1)
    with torch.no_grad():
        learner = token_logprobs(embedded, batch, temperature).numpy()
    np.testing.assert_allclose(np.concatenate([t.generator_logprobs for t in trajectories]), learner, atol=tolerance)
    assert _gap(embedded, trajectories, 1.0) > 0.1
    for request, trajectory in zip(requests, trajectories, strict=True):
        assert (trajectory.prompt_id, trajectory.seed) == (request.prompt_id, request.seed)
        assert trajectory.prompt_ids.tolist() == list(request.prompt_ids)
        assert trajectory.versions.tolist() == [version] * len(trajectory.response_ids)
        assert len(trajectory.generator_logprobs) == len(trajectory.response_ids)


def test_samples_follow_the_distribution(untied: tuple[Generator, PreTrainedModel]) -> None:
    generator, model = untied
    version = _sync(generator, model)
    prompt = _requests(1, length=20)[0].prompt_ids
    count = 2000
    requests = [GenerationRequest("p", prompt, i, seed=i) for i in range(count)]
    trajectories = _generate(generator, requests, _sampling(0.7, max_tokens=1), version)
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].float() / 0.7, dim=-1).numpy()
    observed = np.bincount([t.response_ids[0] for t in trajectories], minlength=len(expected)) / count
    top = np.argsort(-expected)[:5]
    assert expected[top[0]] > 0.02
    standard_error = np.sqrt(expected[top] * (1 - expected[top]) / count)
    assert np.all(np.abs(observed[top] - expected[top]) < 5 * standard_error)


def test_the_seed_decides_the_sample(tied: Generator, embedded: PreTrainedModel) -> None:
    version = _sync(tied, embedded)
    requests = _requests(6, length=70, samples=3)
    sampling = _sampling(1.0)
    first = [t.response_ids.tolist() for t in _generate(tied, requests, sampling, version)]
    reverse = [t.response_ids.tolist() for t in _generate(tied, requests[::-1], sampling, version)][::-1]
    alone = [_generate(tied, [request], sampling, version)[0].response_ids.tolist() for request in requests]
    assert first == reverse == alone
    assert len({tuple(ids) for ids in first}) == len(requests)
    reseeded = [GenerationRequest(r.prompt_id, r.prompt_ids, r.sample_index, r.seed + 1) for r in requests]
    assert all(
        t.response_ids.tolist() != ids
        for t, ids in zip(_generate(tied, reseeded, sampling, version), first, strict=True)
    )


def test_a_response_ends_with_its_first_eos(tied: Generator, embedded: PreTrainedModel) -> None:
    version = _sync(tied, embedded)
    requests = _requests(8, length=40)
    free = [t.response_ids.tolist() for t in _generate(tied, requests, _sampling(1.0, 24), version)]
    eos = free[0][5]
    # The id is in every prompt as well, where it means nothing.
    requests = [GenerationRequest(r.prompt_id, (eos, *r.prompt_ids, eos), 0, r.seed) for r in requests]
    free = [t.response_ids.tolist() for t in _generate(tied, requests, _sampling(1.0, 24), version)]
    eos_of_each = [ids[5] for ids in free]
    reasons = set()
    for request, ids, stop in zip(requests, free, eos_of_each, strict=True):
        trajectory = _generate(tied, [request], _sampling(1.0, 24, eos=stop), version)[0]
        assert trajectory.response_ids.tolist() == ids[: ids.index(stop) + 1]
        assert trajectory.finish_reason == "eos"
        trajectory = _generate(tied, [request], _sampling(1.0, 5, eos=stop), version)[0]
        assert trajectory.response_ids.tolist() == ids[: min(5, ids.index(stop) + 1)]
        assert trajectory.finish_reason == ("eos" if ids.index(stop) < 5 else "length")
        reasons.add(trajectory.finish_reason)
    assert "length" in reasons
    # With a stop token beside the EOS, whichever comes first ends the response.
    ids, stop = free[0], eos_of_each[0]
    earlier = next(token for token in ids if ids.index(token) < ids.index(stop))
    both = replace(_sampling(1.0, 24, eos=stop), stop_token_ids=(earlier, NEVER))
    trajectory = _generate(tied, [requests[0]], both, version)[0]
    assert trajectory.response_ids.tolist() == ids[: ids.index(earlier) + 1] and trajectory.finish_reason == "eos"


def test_no_response_is_shorter_than_its_minimum(tied: Generator, embedded: PreTrainedModel) -> None:
    """Log-probs are those of the learner, which leaves the same ends out at the same places, and no others."""
    version = _sync(tied, embedded)
    requests = _requests(24, length=40)
    free = replace(_sampling(0.7, 24), stop_token_ids=MANY)
    lengths = [len(t.response_ids) for t in _generate(tied, requests, free, version)]
    assert min(lengths) < 7, "some must end early by themselves, or this test shows nothing"
    found = _generate(tied, requests, replace(free, min_tokens=6), version)
    assert all(not np.isin(t.response_ids[:6], (NEVER, *MANY)).any() for t in found)
    lengths = [len(t.response_ids) for t in found]
    assert min(lengths) == 7 and {t.finish_reason for t in found} == {"eos", "length"}
    assert _gap(embedded, found, 0.7) < TOLERANCE
    with torch.no_grad():
        learner = token_logprobs(embedded, collate([Row.of(t) for t in found], pad_token_id=1), 0.7).numpy()
    np.testing.assert_allclose(np.concatenate([t.generator_logprobs for t in found]), learner, atol=TOLERANCE)
    assert _gap(embedded, [replace(t, minimum=None) for t in found], 0.7) > 0.1
    # A response with less room than that is all minimum.
    (cut,) = _generate(tied, requests[:1], replace(free, min_tokens=6, max_tokens=4), version)
    assert len(cut.response_ids) == 4 and _gap(embedded, [cut], 0.7) < TOLERANCE


def test_the_models_own_eos_may_always_be_drawn(untied: tuple[Generator, PreTrainedModel]) -> None:
    """Its generation config names one, which vLLM would bar as well; but what ends a response is the run's to say."""
    generator, model = untied
    assert model.generation_config is not None
    own = model.generation_config.eos_token_id
    assert own not in (None, NEVER)
    sampling = replace(_sampling(1.0, 8), min_tokens=7)
    found = _generate(generator, _requests(32, length=20), sampling, _sync(generator, model))
    with torch.no_grad():
        likeliest = max(
            float(
                model(torch.from_numpy(t.token_ids)[None])
                .logits[0, len(t.prompt_ids) - 1 : -1]
                .softmax(-1)[:, own]
                .max()
            )
            for t in found
        )
    assert likeliest > 10 * TOLERANCE, "if it was barred, the others would have more probability by this, or more"
    assert _gap(model, found, 1.0) < TOLERANCE


def test_a_truncation_leaves_tokens_out(tied: Generator, embedded: PreTrainedModel) -> None:
    """Each sampled token is among those that are left, and its log-prob is that of the softmax over them."""
    version = _sync(tied, embedded)
    requests = _requests(8, length=40)
    for truncation in (Truncation(top_k=3), Truncation(top_p=0.5), Truncation(min_p=0.2)):
        sampling = replace(_sampling(1.0, 8), truncation=truncation)
        found = _generate(tied, requests, sampling, version)
        for t in found:
            with torch.no_grad():
                logits = embedded(torch.from_numpy(t.token_ids)[None]).logits[0, len(t.prompt_ids) - 1 : -1].float()
            for row, token, logprob in zip(logits, t.response_ids, t.generator_logprobs, strict=True):
                p = row.softmax(-1)
                order = p.argsort(descending=True)
                before = p[order].cumsum(0) - p[order]  # of all that are more probable
                left = order[(before < truncation.top_p) & (p[order] >= truncation.min_p * p.max())]
                left = left[: truncation.top_k or None]
                assert token in left
                assert logprob == pytest.approx(float((p[token] / p[left].sum()).log()), abs=1e-3)
        again = _generate(tied, requests[::-1], sampling, version)[::-1]
        assert [t.response_ids.tolist() for t in again] == [t.response_ids.tolist() for t in found]


def test_no_kv_cache_for_all_at_once(untied: tuple[Generator, PreTrainedModel]) -> None:
    generator, model = untied
    version = _sync(generator, model)
    requests = _requests(16, length=110)
    together = _generate(generator, requests, _sampling(1.0, 60), version)
    assert _gap(model, together, 1.0) < TOLERANCE
    alone = [_generate(generator, [request], _sampling(1.0, 60), version)[0] for request in requests[::5]]
    assert [t.response_ids.tolist() for t in alone] == [t.response_ids.tolist() for t in together[::5]]


def test_more_prompt_tokens_than_one_step_takes(tied: Generator, embedded: PreTrainedModel) -> None:
    version = _sync(tied, embedded)
    requests = _requests(48, length=110)
    assert sum(len(request.prompt_ids) for request in requests) > 4096
    assert _gap(embedded, _generate(tied, requests, _sampling(1.0, 2), version), 1.0) < TOLERANCE


def test_new_weights_for_responses_in_flight(tied: Generator, embedded: PreTrainedModel) -> None:
    """Every token is of the model whose version it is stamped with, and the new one reads all of the context anew."""
    models = {_sync(tied, embedded): embedded}
    requests = dict(enumerate(_requests(12, length=70, samples=2), start=100))
    sampling = replace(_sampling(1.0, 40), min_tokens=40, stop_token_ids=MANY)  # which stay barred after a load
    done = tied.advance(requests, sampling, 0.0)
    assert done == {}
    for seed in (5, 6):
        for _ in range(8):
            done |= tied.advance({}, sampling, 0.001)  # one step, or few
        model = _perturbed(embedded, seed)
        models[_sync(tied, model)] = model
    late = dict(enumerate(_requests(3, length=30), start=200))
    done |= tied.advance(late, sampling, 0.001)
    while tied.engine.in_flight:
        done |= tied.advance({}, sampling, 600.0)
    assert sorted(done) == sorted([*requests, *late])
    responses = {ticket: serialized.load() for ticket, serialized in done.items()}
    expected = {
        version: {key: _reference_logprobs(model, t, 1.0) for key, t in responses.items()}
        for version, model in models.items()
    }
    for ticket, trajectory in responses.items():
        assert trajectory.seed == (requests | late)[ticket].seed
        assert len(trajectory.response_ids) == 40
        assert (np.diff(trajectory.versions) >= 0).all()
        for version, logprobs in expected.items():
            own = trajectory.versions == version
            np.testing.assert_allclose(trajectory.generator_logprobs[own], logprobs[ticket][own], atol=TOLERANCE)
    assert all(set(responses[ticket].versions) == set(models) for ticket in requests)
    assert all(set(responses[ticket].versions) == {max(models)} for ticket in late)
    assert tied.advance({}, sampling, 1.0) == {}


def test_new_weights_with_a_slice(tied: Generator, embedded: PreTrainedModel) -> None:
    """What is in flight goes on under them, what comes along begins under them."""
    old = _sync(tied, embedded)
    first, second = (dict(enumerate(_requests(3, length=30), start=at)) for at in (0, 10))
    assert tied.advance(first, _sampling(1.0, 20), 0.001) == {}
    publication = publish(_perturbed(embedded, 7).named_parameters(), old + 1, local=True)
    done = tied.advance(second, _sampling(1.0, 20), 0.001, publication)
    while tied.engine.in_flight:
        done |= tied.advance({}, _sampling(1.0, 20), 600.0)
    assert {(t.oldest, t.newest) for ticket, t in done.items() if ticket < 10} == {(old, old + 1)}
    assert {(t.oldest, t.newest) for ticket, t in done.items() if ticket >= 10} == {(old + 1, old + 1)}
    assert len(done) == 6
    with pytest.raises(WeightSyncError, match=f"has version {old + 1}, refuses {old + 1}"):
        tied.advance({}, _sampling(1.0, 20), 0.0, publication)


def test_a_slice_ends_when_a_third_is_finished(tied: Generator, embedded: PreTrainedModel) -> None:
    """Places that became free are not to wait for the slice's end, nor is anybody for what is not there."""
    _sync(tied, embedded)
    short, long = (dict(enumerate(_requests(n, length=40), start=at)) for n, at in ((6, 0), (2, 10)))
    assert tied.advance(long, _sampling(1.0, 150), 0.0) == {}
    assert sorted(tied.advance(short, _sampling(1.0, 2), 600.0)) == sorted(short)
    assert tied.engine.in_flight == 2
    done: dict[int, SerializedTrajectory] = {}
    while tied.engine.in_flight:
        done |= tied.advance({}, _sampling(1.0), 600.0)
    assert sorted(done) == sorted(long)


def test_aborted_responses_leave_nothing_behind(tied: Generator, embedded: PreTrainedModel) -> None:
    version = _sync(tied, embedded)
    requests = _requests(4, length=40)
    expected = _generate(tied, requests, _sampling(1.0), version)
    tied.advance(dict(enumerate(requests)), _sampling(1.0, 40), 0.001)
    tied.abort()
    again = _generate(tied, requests, _sampling(1.0), version)
    assert [t.response_ids.tolist() for t in again] == [t.response_ids.tolist() for t in expected]


def test_versions_rise_strictly_and_stale_weights_are_refused(tied: Generator, embedded: PreTrainedModel) -> None:
    held = _sync(tied, embedded)
    for version in (held, held - 1):
        with pytest.raises(WeightSyncError, match=f"^generator-0 has version {held}, refuses {version}$"):
            tied.load_weights(publish(embedded.named_parameters(), version, local=True))
    for version in (held + 1, held - 1):
        with pytest.raises(WeightSyncError, match=f"^generator-0 has version {held}, wanted is {version}: sync it"):
            _generate(tied, _requests(1, length=10), _sampling(1.0), version)


def test_weights_that_do_not_fit_leave_the_old_ones_whole(tied: Generator, embedded: PreTrainedModel) -> None:
    version = _sync(tied, embedded)
    new = dict(_perturbed(embedded, 3).named_parameters())
    bias = "model.decoder.layers.0.fc1.bias"
    cases = {
        rf"1 missing \({bias}\)": {name: tensor for name, tensor in new.items() if name != bias},
        r"1 unknown \(stranger\)": new | {"stranger": torch.zeros(1)},
        rf"1 of another shape \({bias}\)": new | {bias: torch.zeros(3)},
    }
    for message, tensors in cases.items():
        with pytest.raises(WeightSyncError, match=rf"nothing was loaded: {message}$"):
            tied.load_weights(publish(tensors.items(), version + 1, local=True))
    with pytest.raises(WeightSyncError, match=rf"1 given twice \({bias}\)$"):
        tied.load_weights(publish([*new.items(), (bias, new[bias])], version + 1, local=True))
    assert _version(tied) == version
    assert _gap(embedded, _generate(tied, _requests(4, length=40), _sampling(1.0), version), 1.0) < TOLERANCE


def test_the_tied_head_may_be_published_under_its_second_name(tied: Generator, embedded: PreTrainedModel) -> None:
    model = _perturbed(embedded, 4)
    version = _version(tied) + 1
    tied.load_weights(publish(model.state_dict().items(), version, local=True))
    assert _gap(model, _generate(tied, _requests(2, length=40), _sampling(1.0), version), 1.0) < TOLERANCE


def test_impossible_requests_are_user_errors(tied: Generator, embedded: PreTrainedModel) -> None:
    version = _sync(tied, embedded)

    def generate(ids: tuple[int, ...], sampling: Sampling) -> None:
        _generate(tied, [GenerationRequest("post-1", ids)], sampling, version)

    with pytest.raises(UserError, match=r"prompt post-1: it has no tokens"):
        generate((), _sampling(1.0))
    with pytest.raises(UserError, match=r"prompt post-1: 180 tokens and a response of 16 exceed the generator's 192"):
        generate((5,) * 180, _sampling(1.0))
    with pytest.raises(UserError, match=r"prompt post-1: token ids 5..8192 do not fit the vocabulary of 8192"):
        generate((5, 8192), _sampling(1.0))
    with pytest.raises(UserError, match=r"temperature 0.001 is too low"):
        generate((5,), _sampling(0.001))


def test_a_model_that_cannot_be_served_is_a_user_error(tied: Generator) -> None:
    with pytest.raises(UserError, match=rf"model {EMBEDDED}: vLLM cannot serve it: .*max_model_len"):
        Generator("generator-2", ModelConfig(path=str(EMBEDDED)), GeneratorConfig(kv_cache_mib=64), 4096, 0)


def test_the_process_keeps_its_thread_count(tied: Generator, embedded: PreTrainedModel) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _generate(tied, _requests(1, length=10), _sampling(1.0), _sync(tied, embedded))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# One more engine, and a family less common than the others.
@pytest.mark.long
def test_a_family_that_vllm_serves_by_transformers_modules(tmp_path: Path) -> None:
    """New weights reach them, also fused and packed ones; and this process can make such models as before. The names in
    files are not those in memory."""
    torch.manual_seed(3)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=1000, max_position_embeddings=256, initializer_range=0.2, **size)
    initial = AutoModelForCausalLM.from_config(config).eval()
    initial.save_pretrained(tmp_path)
    settings = GeneratorConfig(threads=1, kv_cache_mib=64)
    generator = Generator("generator-8", ModelConfig(path=str(tmp_path)), settings, MAX_LENGTH, 0)
    try:
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        requests = _requests(8, length=70, samples=2)
        for changed in (again, _perturbed(initial, 1), _perturbed(initial, 2)):
            trajectories = _generate(generator, requests, _sampling(0.7), _sync(generator, changed))
            assert _gap(changed, trajectories, 0.7) < TOLERANCE
            assert changed is again or _gap(initial, trajectories, 0.7) > 1.0
        assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
        version = generator.load_weights(publish_directory(tmp_path, _version(generator) + 1, local=True))
        assert _gap(initial, _generate(generator, requests, _sampling(0.7), version), 0.7) < TOLERANCE
    finally:
        generator.engine.close()


def test_heads_that_are_refused_are_those_that_vllm_lacks() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


# One more engine, for an actor that test_coordinator has as well.
@pytest.mark.long
def test_a_ray_actor_from_start_to_resync(ray_cluster: None, tmp_path: Path) -> None:
    initial = _tied_qwen2()
    initial.save_pretrained(tmp_path)
    settings = GeneratorConfig(threads=1, kv_cache_mib=64)
    options: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": environment_variables(settings)}}
    model = ModelConfig(path=str(tmp_path))
    generator = Remote.spawn(
        "generator-7", Generator, "generator-7", model, settings, 128, 0, local=False, options=options
    )
    try:
        ready = generator.call("ready", timeout_s=600)
        assert ready["version"] == -1
        assert ready["pid"] != os.getpid()
        assert ready["node"] == ray.get_runtime_context().get_node_id()

        requests = _requests(4, length=70, samples=2)
        with pytest.raises(ActorFailure, match=r"generator-7 has only its initial weights"):
            _generate(generator, requests, _sampling(1.0), 0)

        assert generator.call("load_weights", publish_directory(tmp_path, 0, local=False), timeout_s=120) == 0
        trajectories = _generate(generator, requests, _sampling(1.0), 0)
        assert _gap(initial, trajectories, 1.0) < TOLERANCE
        for version in (3, 4):
            changed = _perturbed(initial, version)
            publication = publish(changed.named_parameters(), version, local=False, bucket_bytes=100_000)
            assert len(publication.buckets) > 1
            assert generator.call("load_weights", publication, timeout_s=120) == version
            trajectories = _generate(generator, requests, _sampling(1.0), version)
            assert _gap(initial, trajectories, 1.0) > 1.0
            assert _gap(changed, trajectories, 1.0) < TOLERANCE

        stats = generator.call("stats", timeout_s=120)
        assert stats["version"] == 4
        assert stats["tokens"] == 3 * sum(len(t.response_ids) for t in trajectories)
        with pytest.raises(UserError, match="prompt prompt-0: "):
            _generate(generator, requests[:1], _sampling(1.0, 128), 4)
    finally:
        generator.kill()


def test_a_load_that_fails_half_way_ends_the_engine(untied: tuple[Generator, PreTrainedModel]) -> None:
    """Last in this file, because no use of that engine can follow."""
    generator, model = untied
    held = _sync(generator, model)
    tensors = dict(_perturbed(model, 5).named_parameters())
    name = "model.decoder.layers.1.fc2.weight"
    tensors[name] = torch.empty(tensors[name].shape, device="meta")  # has a shape, but nothing that could be copied
    with pytest.raises(WeightSyncError, match=r"failed half-way \(NotImplementedError.*restart the generator"):
        generator.engine.load_weights(tensors.items(), _version(generator) + 1)
    with pytest.raises(WeightSyncError, match=r"refuses to work: a weight load failed half-way"):
        _generate(generator, _requests(1, length=10), _sampling(1.0), held)
    with pytest.raises(WeightSyncError, match=r"refuses to work: a weight load failed half-way"):
        _sync(generator, model)

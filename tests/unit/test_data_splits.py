"""Splits by a hash of the id."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config_data import DataConfig
from rayrlhf.data.records import Prompt
from rayrlhf.data.splits import check_disjoint, hash_fraction, is_heldout, split_train, split_valid
from rayrlhf.errors import UserError

RECORDS = [Prompt(f"post{i}", "text") for i in range(4000)]
DATA = DataConfig(sft_fraction=0.5, reward_model_fraction=0.2, dev_fraction=0.25)


def test_shares_are_those_of_the_config() -> None:
    splits = split_train(RECORDS, DATA)
    # Binomial with n = 4000: five standard deviations are at most 158 records.
    for split, share in ((splits.sft, 0.5), (splits.reward_model, 0.2), (splits.rl, 0.3)):
        assert abs(len(split) - share * 4000) < 160
    dev, test = split_valid(RECORDS, DATA)
    assert abs(len(dev) - 1000) < 140 and len(dev) + len(test) == 4000


def test_a_share_of_zero_is_empty() -> None:
    assert split_train(RECORDS, DataConfig(sft_fraction=0.5, reward_model_fraction=0.0)).reward_model == []


@given(st.randoms(use_true_random=False))
def test_place_depends_neither_on_order_nor_on_other_records(rng: random.Random) -> None:
    some = rng.sample(RECORDS, 50)
    whole, part = split_train(RECORDS, DATA), split_train(some, DATA)
    assert {r.id for r in part.sft} == {r.id for r in some} & {r.id for r in whole.sft}
    assert {r.id for r in part.rl} == {r.id for r in some} & {r.id for r in whole.rl}


def test_place_is_the_same_in_every_process() -> None:
    code = "from rayrlhf.data.splits import hash_fraction; print(hash_fraction('post7', 'train'))"
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert float(out.stdout) == hash_fraction("post7", "train")


def test_fraction_is_the_documented_hash() -> None:
    """Known answer: a change would move records between the splits of existing runs."""
    assert hash_fraction("post7", "train") == pytest.approx(0.41766729148988896, abs=1e-12)


def test_salts_are_independent() -> None:
    low = [r.id for r in RECORDS if hash_fraction(r.id, "carve") < 0.1]
    assert 0.3 < sum(hash_fraction(id, "train") < 0.5 for id in low) / len(low) < 0.7
    assert abs(sum(is_heldout(r.id, 0.15) for r in RECORDS) - 600) < 115


def test_overlap_names_the_id_and_both_splits() -> None:
    with pytest.raises(UserError, match="'post3' is in sft and in test"):
        check_disjoint(sft=RECORDS[:5], test=RECORDS[3:4])
    with pytest.raises(UserError, match="'post0' is twice in dev"):
        check_disjoint(dev=[RECORDS[0], RECORDS[0]])
    with pytest.raises(UserError, match="'post1'"):
        split_train([*RECORDS, RECORDS[1]], DATA)
    check_disjoint(sft=RECORDS[:5], test=RECORDS[5:])

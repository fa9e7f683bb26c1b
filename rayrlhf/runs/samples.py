"""Samples that a stage has drawn, kept until it is done: the same command draws only those that are missing.

    sampling/HASH.parquet    the samples of one question to the generators

HASH is of all that decides the samples: the weights' files, the prompts and their seeds, and how the responses end.
So a change of any of it draws them anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrlhf.files import replacing
from rayrlhf.runs.folder import RunFolder
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

_DIRECTORY = "sampling"
_SCHEMA = pa.schema(
    [
        ("place", pa.int64()),
        ("response_ids", pa.list_(pa.int64())),
        ("generator_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("written", pa.list_(pa.bool_())),
        ("turns", pa.int64()),
        ("environment_reward", pa.float64()),
    ]
)


class KeptSamples:
    """The samples of some requests, before they are scored."""

    def __init__(
        self, run: RunFolder, model: Path, requests: Sequence[GenerationRequest], sampling: Sampling, *others: Any
    ) -> None:
        """
        Args:
            run: whose folder keeps them, on this machine.
            model: the directory of the weights that sample them.
            requests: all that are asked for.
            sampling: how their responses are drawn.
            others: what else decides them, as JSON has it.
        """
        self.requests, self.sampling = requests, sampling
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(model.iterdir())]
        asked = [[r.prompt_id, r.prompt_ids, r.sample_index, r.seed, r.prompt, r.reference] for r in requests]
        identity = json.dumps([files, asked, asdict(sampling), others], sort_keys=True)
        name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        self._file = run.path / _DIRECTORY / f"{name}.parquet"

    def read(self, version: int) -> dict[int, Trajectory]:
        """The samples that were kept, by the places of their requests; none where there is no file, or a damaged one.

        Args:
            version: that the weights have now.
        """
        if not self._file.is_file():
            return {}
        try:
            rows = pq.read_table(self._file, schema=_SCHEMA, page_checksum_verification=True).to_pylist()
            return {row["place"]: self._trajectory(version, **row) for row in rows}
        except (pa.ArrowException, OSError, ValueError, TypeError, IndexError):
            return {}

    def write(self, samples: Mapping[int, Trajectory]) -> None:
        """Keep these samples, by the places of their requests, in the place of those that were kept."""
        rows = [
            {
                "place": place,
                "response_ids": t.response_ids.tolist(),
                "generator_logprobs": t.generator_logprobs.tolist(),
                "finish_reason": t.finish_reason,
                "written": None if t.written is None else t.written.tolist(),
                "turns": t.turns,
                "environment_reward": t.environment_reward,
            }
            for place, t in samples.items()
        ]
        with replacing(self._file) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary, write_page_checksum=True)

    def _trajectory(
        self,
        version: int,
        place: int,
        response_ids: list[int],
        generator_logprobs: list[float],
        finish_reason: Any,
        written: list[bool] | None,
        turns: int,
        environment_reward: float | None,
    ) -> Trajectory:
        request = self.requests[place]
        return Trajectory(
            request.prompt_id,
            request.sample_index,
            request.seed,
            np.array(request.prompt_ids, np.int64),
            np.array(response_ids, np.int64),
            np.array(generator_logprobs, np.float32),
            np.full(len(generator_logprobs), version, np.int64),
            finish_reason,
            written=None if written is None else np.array(written, np.bool_),
            turns=turns,
            environment_reward=environment_reward,
            minimum=self.sampling.minimum,
        )


def forget_samples(run: RunFolder) -> None:
    """Delete the samples of a stage that is done."""
    shutil.rmtree(run.path / _DIRECTORY, ignore_errors=True)

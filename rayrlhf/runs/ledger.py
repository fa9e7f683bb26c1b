"""Which prompts the stage `rl` has learnt from: `trained.jsonl` of a run folder, a line a step.

    {"step": 3, "version": 3, "groups": [{"prompt": "t3_1x2y", "samples": 2, "oldest": 2, "newest": 3}, ...]}

`version` is that of the weights that the step began with, `oldest` and `newest` are those that sampled the group's
tokens. A restart from step k writes k + 1, ... again; `read_ledger` drops what the earlier attempt wrote from there on.
So the ledger shows whether a prompt was lost or was trained on twice, whatever died on the way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rayrlhf.runs.folder import RunFolder
from rayrlhf.trajectory import Trajectory


class Ledger:
    """Adds to `trained.jsonl`. One process writes at a time. In a store, lines are there after the next `upload`."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        run.path.mkdir(parents=True, exist_ok=True)
        if run.store:
            if run.store.exists(run.trained):
                run.download(run.trained)  # what another node wrote stays in front of ours
            else:
                run.trained.unlink(missing_ok=True)
        if run.trained.exists() and not run.trained.read_bytes().endswith(b"\n"):
            # An earlier writer was killed in its last line: it must not swallow ours.
            with run.trained.open("ab") as file:
                file.write(b"\n")

    def write(self, step: int, version: int, trajectories: Sequence[Trajectory]) -> None:
        """Add the line of a step that has just been learnt from.

        Args:
            step: counted from 1.
            version: of the weights that the step began with.
            trajectories: of the step, in any order.
        """
        groups: dict[str, dict[str, Any]] = {}
        for trajectory in trajectories:
            versions = trajectory.versions.tolist() or [version]
            group = groups.setdefault(
                trajectory.prompt_id, {"prompt": trajectory.prompt_id, "samples": 0, "oldest": version, "newest": 0}
            )
            group["samples"] += 1
            group["oldest"] = min(group["oldest"], *versions)
            group["newest"] = max(group["newest"], *versions)
        line = json.dumps({"step": step, "version": version, "groups": list(groups.values())})
        with self.run.trained.open("ab") as file:
            file.write(line.encode() + b"\n")

    def upload(self) -> None:
        """Make the store's file that of this node."""
        self.run.upload(self.run.trained)


def read_ledger(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of the steps that count, by rising step; none of a run that has not trained by `rl`."""
    steps: dict[int, dict[str, Any]] = {}
    for text in (run.read(run.trained) or b"").splitlines():
        try:
            line = json.loads(text)
            step = line["step"]
        except (ValueError, TypeError, KeyError):  # torn by a kill
            continue
        for later in [each for each in steps if each >= step]:
            del steps[later]
        steps[step] = line
    return list(steps.values())

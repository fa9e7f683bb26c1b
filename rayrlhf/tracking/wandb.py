"""Weights & Biases: a run of the project WANDB_PROJECT (`rayrlhf` where it is not set).

Its own variables apply, such as WANDB_ENTITY, and WANDB_MODE=offline, with which `wandb sync` uploads later.
"""

from __future__ import annotations

import contextlib
import netrc
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rayrlhf.errors import UserError
from rayrlhf.tracking.base import Outcome, Tracked, flat, staged_numbers_of, texts_of

_OFFLINE = ("offline", "dryrun", "disabled")
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def check() -> None:
    """
    Raises:
        UserError: nobody is logged in, and wandb would ask for a key in the middle of the run.
    """
    if os.environ.get("WANDB_MODE") in _OFFLINE or any(os.environ.get(name) for name in _KEYS):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
            return
    raise UserError("tracking: wandb has no API key; call `wandb login`, or set WANDB_MODE=offline")


class WandbTracker:
    """See `rayrlhf.tracking.base.Tracker`."""

    def open(self, run: Tracked, known: str | None) -> str | None:
        import wandb

        self._wandb, self._stages = wandb, set[str]()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rayrlhf"),
            name=run.name,
            id=known,
            resume="allow" if known else None,
            config=flat(run.config),
            dir=os.environ.get("WANDB_DIR", str(run.path)),
            settings=wandb.Settings(console="off", silent=True),
        )
        return str(self._run.id)

    def write(self, line: Mapping[str, Any]) -> None:
        stage = line["stage"]
        if stage not in self._stages:  # each stage counts steps of its own
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        numbers = staged_numbers_of(line)
        texts = {f"{stage}/{name}": self._wandb.Html(f"<pre>{escape(t)}</pre>") for name, t in texts_of(line).items()}
        if numbers or texts:
            self._run.log({**numbers, **texts, f"{stage}/step": line["step"]})

    def finish(self, outcome: Outcome) -> None:
        self._run.summary.update(dict(outcome.measures))
        if outcome.samples:
            columns = list(outcome.samples[0])
            rows = [[row[column] for column in columns] for row in outcome.samples]
            self._run.log({"samples": self._wandb.Table(columns=columns, data=rows)})
        if outcome.report is not None:
            self._log_report(outcome.report)

    def close(self) -> None:
        self._run.finish()

    def _log_report(self, path: Path) -> None:
        artifact = self._wandb.Artifact(f"report-{self._run.id}", type="report")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

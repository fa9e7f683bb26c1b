"""MLflow: a run of the experiment MLFLOW_EXPERIMENT_NAME (`rayrlhf` where it is not set) at MLFLOW_TRACKING_URI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.tracking.base import Outcome, Tracked, flat, staged_numbers_of, texts_of

_LONGEST_PARAMETER = 6000
_AT_ONCE = 100
"""Parameters of one request, as MLflow limits them."""
_URI = "MLFLOW_TRACKING_URI"


def check() -> None:
    """
    Raises:
        UserError: nothing says where the server is.
    """
    if not os.environ.get(_URI):
        raise UserError(
            f"tracking: mlflow does not know its server; set {_URI}, for example to http://127.0.0.1:5000, "
            "where `mlflow server` listens"
        )


class MlflowTracker:
    """See `rayrlhf.tracking.base.Tracker`."""

    def open(self, run: Tracked, known: str | None) -> str | None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rayrlhf")
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(where, run_name=run.name).info.run_id
        parameters = [Param(key, str(value)[:_LONGEST_PARAMETER]) for key, value in flat(run.config).items()]
        for start in range(0, len(parameters), _AT_ONCE):
            self._client.log_batch(self._id, params=parameters[start : start + _AT_ONCE])
        return str(self._id)

    def write(self, line: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        stage, step, ms = line["stage"], line["step"], int(line["time"] * 1000)
        metrics = [Metric(name, value, ms, step) for name, value in staged_numbers_of(line).items()]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)
        for name, text in texts_of(line).items():
            self._client.log_text(self._id, text, f"{stage}/{name}-{step:06d}.md")

    def finish(self, outcome: Outcome) -> None:
        for name, value in outcome.measures.items():
            self._client.log_metric(self._id, name, value)
        if outcome.samples:
            columns = {name: [row[name] for row in outcome.samples] for name in outcome.samples[0]}
            self._client.log_table(self._id, columns, "samples.json")
        if outcome.report is not None:
            self._client.log_artifact(self._id, str(outcome.report))

    def close(self) -> None:
        self._client.set_terminated(self._id)

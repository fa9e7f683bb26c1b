"""A run that begins with another run's finished stages, and files that stand for their content."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.session import opened
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.reports.overview import read_overview
from rayrlhf.runs import contents
from rayrlhf.runs.changes import content_changes
from rayrlhf.runs.contents import parse_contents, read_contents
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.runs.metrics import MetricsWriter, read_lines
from rayrlhf.runs.sharing import take_over
from rayrlhf.runs.stages import STAGES, stages_from

ORDER = ["sft", "collect", "reward_model", "rl", "evaluate"]


def judge(run: RunFolder, *names: str) -> list[str]:
    """Have these labellers judge, and return all who have."""
    with contextlib.closing(LabelDatabase(run.labels)) as database:
        database.add_items([Item("tea", "What is tea?", ("a", "b"))])
        for name in names:
            database.add_labeller(name)
            database.judge(Judgement("tea", name, (1, 2)), name)
        return [judgement.labeller for judgement in database.judgements()]


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i}?", "response": f"It is {i}."}) + "\n" for i in "abcd"))
    return path


def config(posts: Path, name: str = "one", **sections: Any) -> Config:
    data = {"demonstrations": {"format": "prompts", "path": str(posts)}}
    return parse_config({"name": name, "runs_dir": str(posts.parent / "runs"), "data": data, **sections}, "test")


def opens(own: Config) -> RunFolder:
    """The run's folder as a command opens it: with the contents of its files, and with what it takes over."""
    known = read_contents(own, {}, {})
    run = open_or_create(own, own.runs_dir, contents=known)
    if own.start is not None:
        with run.lock():
            print(take_over(run, own, known))
    return run


def finish(run: RunFolder, *stages: str) -> None:
    """What stages leave: their outputs, the files beside them, and metrics."""
    for stage in stages:
        with run.writing(stage) as output:
            (output / "weights" if output.is_dir() else output).write_text(f"{stage} of {run.name}")
        for name in STAGES[stage].beside:
            (run.path / name).write_text(f"beside {stage}")
        with MetricsWriter(run.path) as metrics:
            if STAGES[stage].trains:
                metrics.write(stage, 1, {f"{stage}/loss": 2.0})
            metrics.write("run", list(STAGES).index(stage), {f"time/{stage}": 100.0})


# ---- from


@pytest.mark.parametrize(
    ("changes", "shared", "because"),
    [
        ({"rl": {"steps": 7}}, ORDER[:3], "rl.steps was 20 and is now 7"),
        ({"rl": {"from": "a/model"}}, ORDER[:3], "rl.from was None and is now 'a/model'"),
        ({"rewards": [{"kind": "model", "weight": 2.0}]}, ORDER[:3], "rewards was [{"),
        ({"evaluate": {"temperature": 0.5}}, ORDER[:4], "evaluate.temperature was 0.01 and is now 0.5"),
        ({"collect": {"prompts": 9}}, ORDER[:1], "collect.prompts was 256 and is now 9"),
        ({"collect": {"prompts": 9}, "rl": {"steps": 7}}, ORDER[:1], "collect.prompts was 256 and is now 9"),
        ({"stages": ORDER}, ORDER[:1], "stages was None and is now"),
        ({"sft": {"epochs": 2}}, [], "sft.epochs was 1 and is now 2"),
        ({"resources": {"learner": {"threads": 2}}, "alarms": {"max_kl": 3.0}}, ORDER, None),
    ],
)
def test_stages_are_taken_over_up_to_the_first_that_a_change_goes_into(
    posts: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], shared: list[str], because: str | None
) -> None:
    first = opens(config(posts))
    finish(first, *ORDER)
    second = opens(config(posts, "two", **changes, **{"from": str(first.path)}))
    assert [stage for stage in STAGES if second.done(stage)] == shared
    record = json.loads(second.shared.read_text())
    assert (record["from"], record["stages"], record["own"]) == (str(first.path), shared, ORDER[len(shared) :])
    assert record["because"] is None if because is None else record["because"].startswith(because)
    out = capsys.readouterr().out
    assert f"from {first.path}: {', '.join(shared) or 'nothing'} " in out
    assert (because or "taken over\n") in out
    beside = {name for stage in shared for name in STAGES[stage].beside}
    assert {path.name for path in second.path.glob("*.*") if path.name not in (".lock", "shared.json")} == (
        {"config.yaml", "contents.json", "metrics.jsonl", *beside, *(["outputs.json"] if shared else [])}
        | {STAGES[stage].output for stage in shared if not STAGES[stage].output_is_directory}
    )
    lines = [json.loads(line) for line in read_lines(second.path).splitlines()]
    assert [line["stage"] for line in lines if line["stage"] != "run"] == [s for s in shared if STAGES[s].trains]
    assert [key for line in lines for key in line if key.startswith("time/")] == [f"time/{stage}" for stage in shared]
    assert [stage.name for stage in read_overview(second.path).stages if stage.done] == shared
    for stage in shared:  # links take no space
        output = Path(STAGES[stage].output) / ("weights" if STAGES[stage].output_is_directory else "")
        assert (second.path / output).samefile(first.path / output)


def test_only_what_the_other_run_has_finished_is_taken_over_and_only_once(
    posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opens(config(posts))
    finish(first, "sft")
    own = config(posts, "two", **{"from": str(first.path)})
    second = opens(own)
    expected = "sft is taken over; collect, reward_model, rl, evaluate anew: that run has not finished collect\n"
    assert capsys.readouterr().out == f"from {first.path}: {expected}"
    finish(first, "collect")
    shutil.rmtree(second.sft)  # to have it made anew
    opens(own)
    assert capsys.readouterr().out == f"from {first.path}: sft was taken over before\n"
    assert not second.done("sft") and not second.done("collect")
    shutil.rmtree(first.path)  # which nobody needs any more
    opens(own)


def test_a_run_with_stages_of_its_own_takes_nothing_over(posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Comparisons of another SFT model than its own would be mixed in."""
    first = opens(config(posts))
    finish(first, "sft", "collect")
    finish(opens(config(posts, "two")), "sft")
    second = opens(config(posts, "two", **{"from": str(first.path)}))
    assert "nothing is taken over, since this run has finished sft itself" in capsys.readouterr().out
    assert (second.sft / "weights").read_text() == "sft of two" and not second.done("collect")


def test_another_content_of_the_data_is_another_setting(posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = opens(config(posts))
    finish(first, "sft")
    posts.write_text(posts.read_text().replace("It is a.", "It is z."))  # of the same size
    second = opens(config(posts, "two", **{"from": str(first.path)}))
    assert not second.done("sft")
    said = f"the content of {posts} (data.demonstrations.path) has changed"
    assert capsys.readouterr().out.endswith(f"nothing is taken over; {', '.join(ORDER)} anew: {said}\n")


@pytest.mark.parametrize(("given", "said"), [("nowhere", "no run folder"), ("one", "is this run")])
def test_a_from_that_names_no_other_run_is_one_line(posts: Path, given: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^from: .*{given}.*{said}") as raised:
        opens(config(posts, **{"from": str(posts.parent / "runs" / given)}))
    assert "\n" not in str(raised.value)


def test_the_line_to_paste_begins_the_run_that_shares_the_rest(posts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(posts.parent)
    finish(opens(config(posts)), *ORDER)
    with pytest.raises(UserError) as raised:
        opens(config(posts, rl={"steps": 3}))
    assert str(raised.value).endswith("rl.steps was 20 and is now 3, but stage 'rl' is already done with the old "
        f"value; put it back, delete {posts.parent}/runs/one, or begin another run that shares the rest: "
        "name=OTHER from=runs/one")  # fmt: skip
    second = opens(config(posts, "OTHER", rl={"steps": 3}, **{"from": "runs/one"}))
    assert [stage for stage in STAGES if second.done(stage)] == ORDER[:3]


# ---- a path stands for its content


def test_a_finished_stage_binds_the_content_of_its_files(posts: Path) -> None:
    own = config(posts)
    finish(opens(own), "sft")
    opens(own)
    before = posts.read_text()
    posts.write_text(before + before.replace("What", "Who"))
    with pytest.raises(UserError) as raised:
        opens(own)
    assert f"the content of {posts} (data.demonstrations.path) has changed, but stage 'sft' is already done" in str(
        raised.value
    )
    assert str(raised.value).endswith("begin another run: name=OTHER") and "\n" not in str(raised.value)
    posts.write_text(before)
    opens(own)
    posts.unlink()  # a finished run can be looked at without its data; and what comes back is compared
    opens(own)
    posts.write_text(before.replace("a", "b"))
    with pytest.raises(UserError, match="has changed"):
        opens(own)


def test_a_folder_of_an_earlier_version_has_no_record_and_gets_one(posts: Path) -> None:
    run = opens(config(posts))
    finish(run, "sft")
    run.contents.unlink()
    posts.write_text(posts.read_text().replace("a", "b"))
    opens(config(posts))
    assert set(parse_contents(run.contents.read_bytes(), "contents.json")) == {"data.demonstrations.path"}


def test_an_interrupted_stage_begins_anew_with_other_content(posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its checkpoints have another name; those of the same content are found again."""

    def names(own: Config) -> list[str]:
        with opened(own, local=True) as session:
            return [session.checkpoint_name(stage) for stage in ("sft", "reward_model", "rl")]

    script = posts.parent / "score.py"
    script.write_text("def score(responses): return [0.0 for _ in responses]\n")
    rewards = [{"kind": "model"}, {"kind": "python", "name": "own", "path": f"{script}:score"}]
    own = config(posts, rewards=rewards)
    first = names(own)
    assert names(own) == first
    script.write_text("def score(responses): return [1.0 for _ in responses]\n")
    second = names(own)
    assert second[:2] == first[:2] and second[2] != first[2]
    said = f"the content of {script} (rewards[1].path) has changed: stages that are not finished begin anew with it"
    assert said in " ".join(capsys.readouterr().out.split())
    posts.write_text(posts.read_text().replace("It is a.", "It is z."))
    assert all(before != after for before, after in zip(second, names(own), strict=True))


def test_files_are_known_by_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in directories; hidden files, and what is on the hub, have no content here."""
    model, posts = tmp_path / "model", tmp_path / "posts.jsonl"
    (model / ".cache").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", ".cache/lock"):
        (model / name).write_text(name)
    posts.write_text("{}")
    own = parse_config(
        {
            "name": "one", "from": str(tmp_path), "model": {"path": str(model)}, "rl": {"from": "org/name"},
            "data": {"demonstrations": {"format": "prompts", "path": str(posts)}},
        },
        "test",
    )  # fmt: skip
    first = read_contents(own, {}, {})
    assert {key: sorted(entry["files"]) for key, entry in first.items()} == {
        "model.path": ["config.json", "model.safetensors"],
        "data.demonstrations.path": ["posts.jsonl"],
    }
    # b2sum -l 128 of the text "{}"
    assert first["data.demonstrations.path"]["files"]["posts.jsonl"]["blake2b"] == "2afb9b83f9314e5d029766197f539792"
    assert content_changes(first, read_contents(own, {}, first)) == []
    (model / ".cache/lock").write_text("other")
    (model / "model.safetensors").write_text("MODEL.safetensors")
    os.utime(model / "model.safetensors", (0, 0))
    changed = content_changes(first, read_contents(own, {}, first))
    assert [change.words for change in changed] == [
        f"the content of {model}/model.safetensors (model.path) has changed"
    ]
    assert changed[0].stages == tuple(STAGES)
    # What was settled when it was read is not read again, unless the file system says that it is another one.
    monkeypatch.setattr(contents, "_SETTLED_NS", -(10**18))
    known = read_contents(own, {}, {})
    read: list[Path] = []

    def look(path: Path) -> dict[str, Any]:
        read.append(path)
        return {"bytes": 0, "blake2b": "new"}

    monkeypatch.setattr(contents, "fingerprint", look)
    read_contents(own, {}, known)
    assert read == []
    replacement = tmp_path / "replacement"
    shutil.copy2(posts, replacement)  # with its times
    replacement.rename(posts)
    read_contents(own, {}, known)
    assert read == [posts]


def test_the_content_of_a_key_goes_into_the_stages_that_its_value_goes_into() -> None:
    assert stages_from("rewards[0].path") == ("rl", "evaluate")
    assert stages_from("data.demonstrations.path") == tuple(STAGES)
    assert stages_from("data.comparisons.path") == stages_from("data.comparisons") == tuple(STAGES)[1:]
    assert stages_from("reward_model.from") == ("reward_model", "dpo", "rl", "evaluate")


@pytest.mark.parametrize(("changes", "taken"), [({}, ["ann"]), ({"collect": {"prompts": 3}}, [])])
def test_judgements_come_with_the_comparisons_that_they_made(
    posts: Path, changes: dict[str, Any], taken: list[str]
) -> None:
    first = opens(config(posts))
    finish(first, "sft", "collect")
    assert judge(first, "ann") == ["ann"]
    second = opens(config(posts, "two", **changes, **{"from": str(first.path)}))
    assert second.labels.exists() == bool(taken)
    if taken:
        assert second.labels.stat().st_mode & 0o077 == 0, "what people said is not for everybody"
        assert judge(second) == taken and judge(second, "bob") == [*taken, "bob"]
        assert judge(first) == ["ann"], "people may go on with either"


def test_judgements_that_cannot_be_read_are_left_out_with_a_line(
    posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opens(config(posts))
    finish(first, "sft", "collect")
    first.labels.write_text("no database")
    second = opens(config(posts, "two", **{"from": str(first.path)}))
    assert second.done("collect") and not second.labels.exists()
    assert f"what people said is not taken over: {first.labels}: cannot be used" in capsys.readouterr().out

"""Runs in a store: what is complete, what a node knows already, who may write. Against pyarrow's filesystems and S3."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayrlhf.config import Config
from rayrlhf.config_data import DatasetConfig
from rayrlhf.config_file import parse_config
from rayrlhf.data.loading import load_source
from rayrlhf.errors import UserError
from rayrlhf.runs import conditional, lease
from rayrlhf.runs.addresses import folder_name, join, local_path, runs_address
from rayrlhf.runs.conditional import ChangedError, ConditionalObject, Version
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.runs.lease import leased
from rayrlhf.runs.metrics import MetricsWriter, read_lines, read_metrics
from rayrlhf.runs.stages import STAGES
from rayrlhf.runs.storage import Mirror, Store, local_copy, sync_mirrors
from rayrlhf.tracking.base import Tracked
from rayrlhf.tracking.registry import make_tracker
from tests.s3 import KEYS, S3, serving


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with serving() as s3:
        yield s3


@pytest.fixture
def s3(server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, and keys and cache of a node in the environment."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    use_cache(tmp_path / "node", monkeypatch)
    return server


@pytest.fixture(params=["file", "mock", "s3"])
def store(request: pytest.FixtureRequest, s3: S3, tmp_path: Path) -> Store:
    """An empty folder of each kind of filesystem."""
    name = f"runs/{tmp_path.name}-{time.monotonic_ns()}"
    uris = {"file": f"file://{tmp_path}/{name}", "mock": f"mock:///{name}", "s3": s3.uri(name)}
    return Store.open(uris[request.param])


def use_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a process of the node with this cache."""
    monkeypatch.setenv("RAYRLHF_CACHE", str(path))
    Store.open.cache_clear()


def other_node(store: Store, tmp_path: Path) -> Store:
    return dataclasses.replace(store, copy=tmp_path / "other node")


def fill(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def contents(path: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in path.iterdir() if not p.name.startswith(".")}


def config(name: str = "one", **changes: object) -> Config:
    return parse_config({"name": name, **changes}, "test")


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path))
    assert join("/runs", "one", "sft") == "/runs/one/sft"
    uri = join("s3://bucket/runs/?endpoint_override=http://host:1", "one")
    assert uri == "s3://bucket/runs/one?endpoint_override=http://host:1"
    assert local_path("/runs/one") == Path("/runs/one")
    assert local_path(uri).is_relative_to(tmp_path) and local_path("hdfs:///runs").is_relative_to(tmp_path)
    # What is inside a folder is inside its copy, and another endpoint's bucket of the same name is another bucket.
    assert local_path(join(uri, "sft")) == local_path(uri) / "sft"
    assert local_path(uri.replace("host:1", "host:2")) != local_path(uri)
    assert [folder_name(join(each, "a.parquet")) for each in (uri, "/runs/one", "s3://b/one?x=/y")] == ["one"] * 3
    assert runs_address("s3://bucket/runs", inside_job=True) == "s3://bucket/runs"
    assert runs_address("file:///a/runs", inside_job=True) == "/a/runs"
    with pytest.raises(UserError, match="relative"):
        runs_address("runs", inside_job=True)
    assert runs_address("file://localhost/a%20b/runs", inside_job=True) == "/a b/runs"
    with pytest.raises(UserError, match="s3://: a URI names a bucket"):
        runs_address("s3://", inside_job=False)
    with pytest.raises(UserError, match="three slashes, as in file:///tmp/runs"):
        runs_address("file://tmp/runs", inside_job=False)


@pytest.mark.parametrize(
    "uri", ["s3://id:hush@b/runs", "abfs://b/runs?client_secret=hush", "abfs://b/runs?sv=1&sig=hush"]
)
def test_keys_in_an_address_are_refused_before_it_is_written_anywhere(uri: str) -> None:
    with pytest.raises(UserError, match=r"://b/runs: .* must hold no keys") as caught:
        runs_address(uri, inside_job=False)
    assert "hush" not in str(caught.value)


def test_a_directory_and_a_file_reach_another_node(store: Store, tmp_path: Path) -> None:
    model, table = fill(store.copy / "sft", weights="w" * 3_000_000, config="{}"), store.copy / "table"
    (model / "more").mkdir()
    (model / "more" / "deep").write_text("x")
    table.write_text("1")
    for path in (model, table):
        assert not store.exists(path)
        store.upload(path)
        assert store.exists(path)
    other = other_node(store, tmp_path)
    there = other.download(other.copy / "sft")
    assert (there / "weights").read_text() == "w" * 3_000_000 and (there / "more" / "deep").read_text() == "x"
    assert other.download(other.copy / "table").read_text() == "1"


def test_a_new_upload_replaces_the_directory_here_and_on_other_nodes(store: Store, tmp_path: Path) -> None:
    other, model = other_node(store, tmp_path), store.copy / "sft"
    store.upload(fill(model, old="1", both="1"))
    there = other.download(other.copy / "sft")
    (there / "both").write_text("kept")  # shows whether it is downloaded again
    other.download(there)
    assert contents(there) == {"old": "1", "both": "kept"}
    (model / "old").unlink()
    store.upload(fill(model, new="2", both="2"))
    assert contents(other.download(there)) == {"new": "2", "both": "2"}


def test_half_a_directory_is_none(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, model = other_node(store, tmp_path), fill(store.copy / "sft", a="1", b="1")
    store.upload(model)

    def breaks(*_: object) -> None:
        with store.filesystem.open_output_stream(f"{store.root}/sft/a") as file:
            file.write(b"2")
        raise OSError("connection lost")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_copy", breaks)
        with pytest.raises(OSError, match="connection lost"):
            store.upload(model)
    assert not store.exists(model)
    with pytest.raises(FileNotFoundError, match="sft"):
        other.download(other.copy / "sft")
    assert not (other.copy / "sft").exists()
    store.upload(model)
    assert contents(other.download(other.copy / "sft")) == {"a": "1", "b": "1"}


def test_processes_of_a_node_download_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = other_node(store, tmp_path)
    store.upload(fill(store.copy / "sft", a="1"))
    copied, plain = [], Store._copy

    def counted(self: Store, source: str, *rest: object) -> None:
        copied.append(source)
        time.sleep(0.1)
        plain(self, source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_copy", counted)
    threads = [threading.Thread(target=other.download, args=[other.copy / "sft"]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copied == [f"{store.root}/sft"]
    assert contents(other.copy / "sft") == {"a": "1"}


def test_files_of_a_folder_are_mirrored(store: Store, tmp_path: Path) -> None:
    other = other_node(store, tmp_path)
    fill(store.copy, table="1", stays="1")
    for path in (store.copy / "table", store.copy / "stays", fill(store.copy / "sft", a="1")):
        store.upload(path)
    fill(other.copy, left_over="of an earlier run")
    other.pull_files()
    assert sorted(p.name for p in other.copy.iterdir() if not p.name.startswith(".")) == ["stays", "table"]
    (store.copy / "table").unlink()
    store.upload(store.copy / "table")
    (store.copy / "stays").write_text("2")
    store.upload(store.copy / "stays")
    other.pull_files()
    assert contents(other.copy) == {"stays": "2"}


def test_part_of_a_file(store: Store) -> None:
    store.write(f"{store.root}/a" if store.filesystem.type_name == "s3" else _made(store, "a"), b"0123456789")
    assert store.read_from("a", 4) == b"456789"
    assert store.read_from("a", 10) == store.read_from("a", 11) == store.read_from("none", 0) == b""


def _made(store: Store, name: str) -> str:
    store.filesystem.create_dir(store.root, recursive=True)
    return f"{store.root}/{name}"


def test_local_copy(s3: S3) -> None:
    assert local_copy("/a/path") == "/a/path" and local_copy("org/model") == "org/model"
    store = Store.open(s3.uri("local/one"))
    store.upload(fill(store.copy / "sft", a="1"))
    address = s3.uri("local/one/sft")
    assert local_copy(address) == str(local_path(address))
    assert contents(local_path(address)) == {"a": "1"}
    with pytest.raises(FileNotFoundError, match="policy"):
        local_copy(s3.uri("local/one/policy"))


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("nope://bucket/runs", "Unrecognized filesystem type"),
        ("s3://key:secret@bucket/runs", "AWS_"),
        ("s3://nowhere/runs", "nowhere"),
    ],
)
def test_what_does_not_work_is_said_in_one_line(s3: S3, uri: str, reason: str) -> None:
    if uri == "s3://nowhere/runs":
        uri += f"?endpoint_override={s3.endpoint}"
    with pytest.raises(UserError) as caught, RunFolder(join(uri, "one")).lock():
        pass
    message = str(caught.value)
    assert reason in message and "\n" not in message and "secret@" not in message


def test_a_run_in_a_store_continues_from_an_empty_cache(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = s3.uri("continued")
    run = open_or_create(config(), runs)
    for stage in list(STAGES)[:2]:
        with run.writing(stage) as temporary:
            (temporary / "file" if temporary.is_dir() else temporary).write_text(stage)
            assert not run.done(stage)
        assert run.done(stage)
    use_cache(tmp_path / "elsewhere", monkeypatch)
    there = open_or_create(config(), runs)
    assert there.path != run.path
    assert [there.done(stage) for stage in STAGES] == [True, True, *[False] * (len(STAGES) - 2)]
    assert not there.sft.exists() and (there.download(there.sft) / "file").read_text() == "sft"
    assert there.comparisons.read_text() == "collect"
    assert local_copy(there.address_of(there.sft)) == str(there.sft)
    with pytest.raises(UserError, match=r"seed was 0 and is now 1.*delete s3://bucket/continued/one"):
        open_or_create(config(seed=1), runs)
    assert set(s3.objects("continued/one/")) == {
        "config.yaml", "comparisons.parquet", "outputs.json", "sft/file", "sft/.done", ".lock"
    }  # fmt: skip


def test_metrics_reach_the_store_and_the_next_writer(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = s3.uri("metrics/one")
    with MetricsWriter(address) as writer:
        writer.write("sft", 0, {"sft/loss": 2.0})
        sync_mirrors()
        first = read_lines(address)
        assert first.count(b"\n") == 1
        writer.write("sft", 1, {"sft/loss": 1.0})
    assert read_lines(address, len(first)).count(b"\n") == 1
    use_cache(tmp_path / "elsewhere", monkeypatch)
    with MetricsWriter(address) as writer:
        writer.write("sft", 1, {"sft/loss": 0.5})
    assert [line["sft/loss"] for line in read_metrics(address, "sft")] == [2.0, 0.5]
    objects = s3.objects("metrics/one/")
    assert objects["metrics.jsonl"].count(b"\n") == 3


def test_tensorboards_events_reach_the_store(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two sessions on two machines; the newer hides what it repeats."""
    address = s3.uri("board/one")
    for machine, loss in (("first", 1.0), ("second", 0.5)):
        use_cache(tmp_path / machine, monkeypatch)
        tracker, run = make_tracker("tensorboard"), RunFolder(address)
        tracker.open(Tracked("one", run.address, run.path, {}), None)
        for step in (0, 1) if machine == "first" else (1,):
            tracker.write({"stage": "sft", "step": step, "time": 1.0, "sft/loss": loss})
        tracker.close()
    objects = s3.objects("board/one/")
    events = {name: content for name, content in objects.items() if name.startswith("tensorboard/sft/")}
    assert len(events) == 2
    for name, content in events.items():
        fill(tmp_path / "board", **{Path(name).name: ""})
        (tmp_path / "board" / Path(name).name).write_bytes(content)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("sft/loss")] == [(0, 1.0), (1, 0.5)]


def test_a_mirror_uploads_what_an_earlier_process_left_behind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was killed before its last upload: of a file that grew, and of one that the store never saw."""
    fill(store.copy, same="1", grew="1", never="1", other="1")
    for name in ("same", "grew"):
        store.upload(store.copy / name)
    (store.copy / "grew").write_text("12")
    uploaded, plain = [], Store.upload

    def counted(self: Store, path: Path) -> None:
        uploaded.append(path.name)
        plain(self, path)

    monkeypatch.setattr(Store, "upload", counted)
    monkeypatch.setattr(Store, "open", lambda address: store)  # pyarrow's mock filesystem forgets
    Mirror(store.address, ["same", "grew", "never"]).close()
    assert {name: store.read_from(name, 0) for name in ("same", "grew", "never", "other")} == {
        "same": b"1", "grew": b"12", "never": b"1", "other": b"",
    }  # fmt: skip
    assert sorted(uploaded) == ["grew", "never"]


def test_metrics_appear_while_they_are_written(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrlhf.runs.storage.SYNC_S", 0.05)
    address = s3.uri("growing/one")
    with MetricsWriter(address) as writer:
        for step in range(2):
            writer.write("rl", step, {"rl/kl": 1.0})
            deadline = time.monotonic() + 20
            while len(read_metrics(address)) <= step and time.monotonic() < deadline:
                time.sleep(0.05)
            assert [line["step"] for line in read_metrics(address)] == list(range(step + 1))


# ---- the lease

on_s3 = pytest.mark.parametrize("store", ["s3"], indirect=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "_WATCH_S", 0.05)
    monkeypatch.setattr(lease, "PATIENCE_S", math.inf)  # a holder of this process never counts as dead


def left_behind(store: Store, holder: str, machine: str = "another", patience: float = 0.5) -> str:
    store.filesystem.create_dir(store.root, recursive=True)
    store.write(f"{store.root}/.lock", f"{holder}\ntoken\n0\n{machine}\n{patience}".encode())
    return f"{store.root}/.lock"


OTHER = "process 2 on another-machine"


@on_s3
def test_a_lease_that_is_renewed_keeps_others_out(store: Store, quick: None) -> None:
    refused = pytest.raises(UserError, match=f"written by process {os.getpid()} on .*another name")
    with leased(store), refused, leased(store):
        raise AssertionError("two holders")
    with leased(store):
        pass
    assert store.read(f"{store.root}/.lock") == b"" and lease.lease_holder(store) is None


@on_s3
def test_a_lease_that_nobody_renews_is_taken_when_it_says_so(store: Store, quick: None) -> None:
    left_behind(store, OTHER, patience=1.5)
    assert lease.lease_holder(store) == OTHER
    started = time.monotonic()
    with leased(store):
        assert time.monotonic() - started > 1.5
        assert str(lease.lease_holder(store)).startswith(f"process {os.getpid()} ")


@on_s3
def test_of_many_writers_of_one_version_one_succeeds(store: Store) -> None:
    written = ConditionalObject(store, ".lock")
    assert written.read() is None
    for before in (None, "0", "the winner's"):
        version, together = written.read(), threading.Barrier(6)
        won: list[Version] = []

        def write(i: int, version: Any = version, won: Any = won, together: Any = together) -> None:
            together.wait(60)
            with contextlib.suppress(ChangedError):
                won.append(ConditionalObject(store, ".lock").write(f"{version}, then {i}", version))

        threads = [threading.Thread(target=write, args=[i]) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (version is None) is (before is None)
        assert len(won) == 1 and won == [written.read()]


@on_s3
@pytest.mark.parametrize("expired", [False, True], ids=["none", "expired"])
def test_of_two_that_find_the_same_lease_one_holds_it(
    store: Store, quick: None, monkeypatch: pytest.MonkeyPatch, expired: bool
) -> None:
    """The other one's write falls between what this one reads and what it writes."""
    if expired:
        left_behind(store, "process 1 on a third machine", patience=0.1)
    look = lease._free_version

    def look_and_be_late(*args: Any) -> Any:
        found = look(*args)
        left_behind(store, OTHER)
        return found

    monkeypatch.setattr(lease, "_free_version", look_and_be_late)
    with pytest.raises(UserError, match=f"written by {OTHER}"), leased(store):
        raise AssertionError("two holders")
    assert lease.lease_holder(store) == OTHER


@on_s3
def test_a_write_whose_answer_was_lost_is_known_as_ones_own(
    store: Store, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client tries it again, and the store refuses that for the sake of the first one."""
    plain = ConditionalObject.write
    lost: list[Version] = []
    third = threading.Event()

    def write(self: ConditionalObject, content: str, before: Any) -> Any:
        version = plain(self, content, before)
        if f"\n{len(lost)}\n" in content:  # the first write, and the first two renewals
            lost.append(version)
            if len(lost) == 3:
                third.set()
            raise ChangedError
        return version

    monkeypatch.setattr(ConditionalObject, "write", write)
    with leased(store):
        assert third.wait(300)
    assert store.read(f"{store.root}/.lock") == b""


@on_s3
def test_a_server_without_conditions_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda bucket, path, content, mode: put(bucket, path, content))
    with pytest.raises(UserError, match="the server ignores If-None-Match"), leased(store):
        raise AssertionError("began")


def test_the_bucket_of_each_kind_of_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore opens the bucket, the folder and the account that pyarrow does."""

    def bucket(address: str, root: str) -> Any:
        return conditional._bucket(Store(address, SimpleNamespace(region="eu-west-1"), root, tmp_path))

    google, folder = bucket("gs://b/runs/one", "b/runs/one")
    assert (type(google).__name__, google.config["bucket"], folder) == ("GCSStore", "b", "runs/one")
    azure, folder = bucket("abfs://c@acct.dfs.core.windows.net/runs/one", "c/runs/one")
    assert (azure.config["container_name"], azure.config["account_name"], folder) == ("c", "acct", "runs/one")
    amazon, folder = bucket("s3://b/runs/one?endpoint_override=127.0.0.1:9&scheme=http", "b/runs/one")
    assert (amazon.config["region"], amazon.config["endpoint"]) == ("eu-west-1", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hdfs://h/runs: runs are kept in s3://, gs:// or abfs://"):
        bucket("hdfs://h/runs", "runs")


def test_keys_of_the_file_of_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow reads it by itself."""
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b%\n[team]\naws_access_key_id = c\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    assert conditional._profile_keys() == {"access_key_id": "a", "secret_access_key": "b%"}
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert conditional._profile_keys() == {"access_key_id": "c"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the environment")
    assert conditional._profile_keys() == {}


@on_s3
def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(store: Store, quick: None) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left_behind(
        store, f"process {ended.pid} on {socket.gethostname()}", lease._machine(), math.inf
    )  # whoever waited would wait for ever
    with leased(store):
        pass
    # On another machine of the same name (a container, say) a process of that number may well live.
    left_behind(store, f"process {ended.pid} on {socket.gethostname()}", patience=0.5)
    started = time.monotonic()
    with leased(store):
        assert time.monotonic() - started > 0.5


@on_s3
@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_who_has_lost_its_lease_ends_and_leaves_it_to_the_other(
    store: Store, quick: None, handler: Any, request: pytest.FixtureRequest
) -> None:
    """As after a while without the network, in which another process took the run over.

    A shell script's `command &` ignores Ctrl-C, but is not to write into another's run either.
    """
    before = signal.signal(signal.SIGINT, handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), leased(store):
        if handler is signal.SIG_IGN:
            os.kill(os.getpid(), signal.SIGINT)
        lock = left_behind(store, OTHER)
        time.sleep(250)  # until it is interrupted
    found = store.read(lock)
    assert found is not None and found.startswith(b"process 2 on another-machine")
    assert signal.getsignal(signal.SIGINT) is handler


def test_data_in_a_bucket(s3: S3) -> None:
    """A file, a pattern and a directory of a bucket, behind options; and what is not there."""
    store = Store.open(s3.uri("data"))
    for name in ("train-1.jsonl", "train-0.jsonl", "validation.jsonl", "deep/train-2.jsonl"):
        path = f"{store.root}/{name}"
        store.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        store.write(path, json.dumps({"prompt": name}).encode())

    def train(path: str) -> list[str]:
        return [row.values["prompt"] for row in load_source(DatasetConfig(path=s3.uri(path))).train]

    assert train("data/train-0.jsonl") == ["train-0.jsonl"]
    assert train("data/train-*.jsonl") == ["train-0.jsonl", "train-1.jsonl"]
    assert train("data/**/train-*.jsonl") == ["deep/train-2.jsonl", "train-0.jsonl", "train-1.jsonl"]
    directory = load_source(DatasetConfig(path=s3.uri("data/")))
    assert sorted(row.values["prompt"] for row in directory.train) == train("data/**/train-*.jsonl")
    assert directory.valid is not None and [row.values["prompt"] for row in directory.valid] == ["validation.jsonl"]
    for path, said in (("nothing/", "no such file or directory"), ("data/no-*", "no such file matches this pattern")):
        with pytest.raises(UserError, match=said):
            load_source(DatasetConfig(path=s3.uri(path)))

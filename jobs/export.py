"""`rayrlhf export RUN DIR`: a model of a run as a Hugging Face directory with a card, and its upload to the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported when it is asked for

from jobs.console import console
from rayrlhf.errors import UserError, one_line
from rayrlhf.files import replacing
from rayrlhf.models.files import stored_names
from rayrlhf.models.saving import ADAPTERS
from rayrlhf.reports.card import Exported, Place, model_card, place_of
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.models import BASE, model_of, open_run
from rayrlhf.runs.storage import local_copy

ADAPTER_CONFIG = "adapter_config.json"


def export(
    address: str,
    directory: Path,
    model: str = "policy",
    adapters: bool = False,
    license: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Write the directory, say what is in it, and upload it if `push` names a repository.

    Raises:
        UserError: there is no such run or model, the directory is in use, or the hub refuses.
    """
    if private and not push:
        raise UserError("export: --private is about the repository that --push makes; give both")
    check_target(directory)
    if push:
        check_repository(push)
    run = open_run(address)
    files = write_model(run, directory, model, adapters, license, push or directory.resolve().name)
    size = sum(file.stat().st_size for file in files) / 2**20
    console.print(f"export: {model} of {run.name} in {directory}: {len(files)} files, {size:.1f} MiB")
    if license is None:
        console.print("export: the card names no licence; give one with --license, such as --license apache-2.0")
    if push:
        console.print(f"export: uploaded: {upload(directory, push, private)}", soft_wrap=True)


def write_model(
    run: RunFolder, directory: Path, model: str, adapters: bool, license: str | None, title: str
) -> list[Path]:
    """Write a model with its card; returns the files.

    Args:
        title: of the card, by which its examples load the model.

    Raises:
        UserError: there is no such model, or the directory is in use.
    """
    check_target(directory)
    if model == BASE:
        raise UserError(f"export: {BASE} is the model that the run began with, and is there already")
    source = Path(local_copy(model_of(run, model)))
    if not source.is_dir():
        raise UserError(f"export: {model} is {source} of the hub, which this run has not trained")
    stored_names(source, str(source))  # that it is whole
    base = _adapters_base(source, model) if adapters else None
    card = model_card(run, Exported(model, title, license, base))
    with replacing(directory, directory=True) as partial:
        if base:
            copy_adapters(source, partial, base.name)
        else:
            copy_model(source, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return sorted(directory.iterdir())


def copy_model(source: Path, target: Path) -> None:
    """Copy the files of a model, without its adapters."""
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)


def copy_adapters(source: Path, target: Path, base: str) -> None:
    """Copy the adapters of a model and its tokenizer.

    Args:
        source: the model's directory.
        target: another one.
        base: how the adapters call the model onto which they belong, in place of a path of this machine.
    """
    beside = [file for file in source.iterdir() if file.is_file() and not _of_weights(file)]
    files = {file.name: file for file in (*beside, *(source / ADAPTERS).iterdir()) if file.is_file()}
    for name, file in files.items():
        shutil.copyfile(file, target / name)
    settings = json.loads((target / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    (target / ADAPTER_CONFIG).write_text(
        json.dumps(settings | {"base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8"
    )


def _of_weights(file: Path) -> bool:
    """Whether a file belongs to the merged weights, which adapters come without."""
    return ".safetensors" in file.suffixes or file.name in ("config.json", "generation_config.json")


def check_repository(name: str) -> None:
    """
    Raises:
        UserError: the name is none of a repository, or nobody is logged in.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"export: --push {name!r}: {one_line(error)}; write OWNER/NAME") from None
    if get_token() is None:
        raise UserError("export: --push needs a token of the hub: `hf auth login`, or the variable HF_TOKEN")


def upload(directory: Path, repository: str, private: bool) -> str:
    """Upload all files of a directory in one commit, into a repository that is made if it is not there.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub refuses, or cannot be reached. The directory stays.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload by rayrlhf export")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"export: {directory} is written, but {repository} could not be uploaded: {one_line(error)[:300]}; "
            f"`hf upload {repository} {directory}` tries again"
        ) from None
    return str(done.commit_url)


def check_target(directory: Path) -> None:
    """
    Raises:
        UserError: the directory is in use.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"export: {directory} is there already and not empty; give a new directory")


def _adapters_base(source: Path, model: str) -> Place:
    """The model onto which the adapters belong.

    Raises:
        UserError: the model was not trained with LoRA.
    """
    settings = source / ADAPTERS / ADAPTER_CONFIG
    if not settings.is_file():
        raise UserError(f"export: {model} has no adapters, since model.lora is not set; leave out --adapters")
    base = str(json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"])
    return place_of(base, Path(base).is_absolute())

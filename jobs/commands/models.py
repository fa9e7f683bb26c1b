"""Commands that use the models of a run: `chat`, `serve`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.options import Folder, run_guarded

app = typer.Typer()


@app.command("chat")
def chat_command(
    run_folder: Folder,
    models: Annotated[
        str | None, typer.Option(help="Which of the run's models answer: base,sft,dpo,policy. Default: all but base.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="chat, post or text: what is typed is a turn, a post, or the prompt itself.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt, in place of the run's own.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest token. Default: that of rl.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first answer; each further one has the next.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer. Default: data.max_response_tokens.")] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Show beside each answer what the reward model gives it.")
    ] = False,
) -> None:
    """Talk to the models of a run, side by side. Ctrl-C stops an answer, /quit ends. Reads a pipe, too; no Ray."""

    def action() -> None:
        from jobs.chat import Options, chat

        chat(run_folder, Options(models, template, system, temperature, seed, max_tokens, score))

    run_guarded(action)


@app.command("serve")
def serve_command(
    run_folder: Folder,
    models: Annotated[
        str | None, typer.Option(help="Which of the run's models: base,sft,dpo,policy. Default: all but base.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; other machines reach it only if this says so.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="Holds the token. Default: RAYRLHF_TOKEN, else a new one, printed once.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer. Default: what the model was trained on.")
    ] = None,
) -> None:
    """Serve the models of a run by vLLM behind one OpenAI-compatible address. Ctrl-C ends it; no Ray."""

    def action() -> None:
        from jobs.serve import serve

        serve(run_folder, models, host, port, token_file, max_model_len)

    run_guarded(action)


@app.command("export")
def export_command(
    run_folder: Folder,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory, or an empty one.")],
    model: Annotated[str, typer.Option(help="policy, dpo, sft or reward_model.")] = "policy",
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Only the LoRA adapters, as peft loads them, in place of a merged model.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="Its licence as the hub names it, such as apache-2.0.")] = None,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Upload it to the hub as OWNER/NAME, too.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that push makes is private.")] = False,
) -> None:
    """Write a model of a run as a Hugging Face directory with a card. With --push it is uploaded; needs no Ray."""

    def action() -> None:
        from jobs.export import export

        export(run_folder, directory, model, adapters, license, push, private)

    run_guarded(action)

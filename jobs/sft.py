"""Stage `sft`: supervised fine-tuning on demonstrations. `ray job submit ... -- python -m jobs.sft --config FILE`."""

from __future__ import annotations

from actors.pools.remote import put
from actors.training.sft import DevPrompt, SFTArguments, sft_loop
from jobs.session import Session
from jobs.stage import main, stage
from rayrlhf.data.rows import Row


@stage("sft")
def sft(session: Session) -> None:
    """Fine-tune the base model; keeps the checkpoint whose generated dev answers have the best mean ROUGE."""
    session.warm_up(generators=True)
    data = session.data
    records = data.train.sft[: session.config.sft.max_demonstrations]
    rows = [
        Row.completion(prompt.ids, response)
        for prompt, response in zip(data.prompts(records), data.responses(records), strict=True)
    ]
    dev = [
        DevPrompt(prompt.id, prompt.ids, tuple(response), record.response)
        for prompt, response, record in zip(data.prompts(data.dev), data.responses(data.dev), data.dev, strict=True)
    ]
    link = session.rollouts.start()
    arguments = SFTArguments(
        **session.loop_arguments("sft"),
        model=session.starts.base,
        train=put(rows, session.local),
        dev=put(dev, session.local),
        coordinator=link.remote,
        setup=link.setup,
    )
    session.train("sft", sft_loop, arguments)


if __name__ == "__main__":
    main(sft)

"""Stage `sft`: supervised fine-tuning on demonstrations. `ray job submit ... -- python -m jobs.sft --config FILE`."""

from __future__ import annotations

from actors.pools.remote import put
from actors.training.sft import DevPrompt, SFTArguments, sft_loop
from jobs.session import Session
from jobs.stage import main, stage
from rayrlhf.data.rows import Row
from rayrlhf.data.tokens import encode_responses


@stage("sft")
def sft(session: Session) -> None:
    """Fine-tune the base model; keeps the checkpoint whose generated dev answers have the best mean ROUGE."""
    session.warm_up(generators=True)
    config, limit = session.config, session.config.data.max_response_tokens
    records = session.train_splits.sft[: config.sft.max_demonstrations]
    prompts = session.encode([*records, *session.dev])
    texts = [r.response for r in [*records, *session.dev]]
    responses = encode_responses(session.tokenizer, texts, limit, [r.prompt for r in [*records, *session.dev]])
    rows = [Row.completion(p.ids, r) for p, r in zip(prompts, responses, strict=True)]
    dev = [
        DevPrompt(p.id, p.ids, tuple(ids), record.response)
        for p, ids, record in zip(prompts[len(records) :], responses[len(records) :], session.dev, strict=True)
    ]
    arguments = SFTArguments(
        **session.loop_arguments("sft"),
        model=session.model,
        train=put(rows[: len(records)], session.local),
        dev=put(dev, session.local),
        coordinator=session.coordinator,
    )
    session.train("sft", sft_loop, arguments)


if __name__ == "__main__":
    main(sft)

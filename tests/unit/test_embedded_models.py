"""The models that the package ships do what their pages say."""

from __future__ import annotations

import pyarrow.parquet as pq

from rayrlhf.data.rows import Row
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from scripts.pretrain.titles import prompt_of
from scripts.pretrain.tokens import ASSETS


def test_the_start_of_the_reward_model_prefers_a_posts_own_summary_and_title() -> None:
    """It was trained on titles of other posts, and never on a summary; chance would be right in half of the pairs."""
    path = resolve_model("embedded:opt-7m-titles")
    tokenizer = load_tokenizer(path)
    forward = Forward(load_reward_model(path), pad_token_id=tokenizer.pad_token_id, max_tokens=4096, dtype="float32")
    posts = pq.read_table(ASSETS / "tldr/valid.parquet").slice(0, 64).to_pylist()

    def row(post: dict[str, str], text: str) -> Row:
        answer = tokenizer(f" {text}", add_special_tokens=False).input_ids[:39]
        return Row.completion(tokenizer(prompt_of(post)).input_ids, [*answer, tokenizer.eos_token_id])

    shares = {}
    for part in ("title", "summary"):
        texts = [post[part] for post in posts]
        own = forward.row_scores([row(*each) for each in zip(posts, texts, strict=True)])
        other = forward.row_scores([row(*each) for each in zip(posts, [*texts[1:], texts[0]], strict=True)])
        shares[part] = sum(a > b for a, b in zip(own, other, strict=True)) / len(posts)
    assert shares["title"] > 0.85 and shares["summary"] > 0.75

"""Taking secrets out of text that people send each other: logs, configs, what `rayrlhf doctor` packs.

It is a net, not a proof: a secret under an innocent name that looks like any word stays. The environment, where keys
belong, is never written into such text.
"""

from __future__ import annotations

import re

GONE = "***"

_SECRET = r"(?:token|password|passwd|secret|credential|api[_-]?key|access[_-]?key|private[_-]?key)"
_OF_A_TOKENIZER = r"(?:eos|bos|pad|unk|sep|cls|mask|stop|end|special)_token\b"
_PATTERNS = (
    (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", GONE),
    (r"(?<=://)[^/@\s'\"]+(?=@)", GONE),  # user:password@host
    (r"(?i)(?<=[?&])((?:[\w-]*(?:token|secret|password|key|sas)|sig)=)[^&\s'\"]+", rf"\g<1>{GONE}"),
    (r"(?i)\b(bearer|basic) +[\w.~+/=-]{8,}", rf"\g<1> {GONE}"),
    (r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|AKIA[0-9A-Z]{16}|xox[a-z]-[\w-]{10,})", GONE),
    (r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*", GONE),  # a JSON web token
    # `name: value`, `NAME=value`, `"name": "value"`. A number is no secret: pad_token_id, max_tokens.
    (
        rf"(?i)(?<![\w-])((?!{_OF_A_TOKENIZER})[\w-]*{_SECRET}(?:_access_key)?[\"']?\s*[:=]\s*)"
        r"(?!(?:null|true|false|none|[\d.]+)\b)(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;&}]+)",
        rf"\g<1>{GONE}",
    ),
)


def redacted(text: str) -> str:
    """The text without what looks like a secret.

    >>> redacted("POST http://ann:pw@host/v1?token=abc Authorization: Bearer 0123456789")
    'POST http://***@host/v1?token=*** Authorization: Bearer ***'
    """
    for pattern, instead in _PATTERNS:
        text = re.sub(pattern, instead, text)
    return text

"""Ray actors and pools of them. Nothing here knows of language models.

remote ◀─ worker ◀─ heartbeat ◀─ pool ◀─ dispatch      each file imports only those to its left
a call    an actor  who gives     which   who does what,
          at work   signs of life actors  and the answers

Beside them: `beats` (an actor's own signs of life), `autopsy` (what one that hangs is at), `stragglers`, `announcing`
(what the user is told) and `monitoring` (what a dashboard is shown).
"""

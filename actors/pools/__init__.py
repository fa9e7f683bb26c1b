"""Ray actors and pools of them. Nothing here knows of language models.

remote ◀─ worker ◀─ pool ◀─ dispatch          each file imports only those to its left
a call     an actor   which    who does what,
           at work    actors   and the answers
"""

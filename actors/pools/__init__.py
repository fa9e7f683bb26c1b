"""Ray actors and pools of them. Nothing here knows of language models."""

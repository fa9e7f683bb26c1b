"""rayrlhf: reinforcement learning from human feedback on Ray (the library, which knows neither Ray nor vLLM)."""

__version__ = "0.1.0"

"""rayrlhf: reinforcement learning from human feedback on Ray (library room: no Ray, no vLLM)."""

__version__ = "0.1.0"

"""Environment of the oracle tests, set before TRL is imported."""

import os

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1")  # its PPO lives in trl.experimental, and the exact version is pinned

"""The requests of each step: samples of its prompts, and of the prompts that take the place of some of them.

With `rl.max_redraws` a group whose responses all have the same score gives its place to another prompt, since its
advantages are all 0 (dynamic sampling of DAPO, Yu et al. 2025, section 3.2). Example with three groups a step and two
redraws; `=` marks a group without spread:

    drawn at first       a   b=  c=
    first redraw             d=  e        prompts that the step does not have
    second redraw            f=           the last one: f stays, with advantages of 0
    batch                a   f   e

Everything here is a function of (seed, step): a run that continues asks for the same samples as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayrlhf.config import Config
from rayrlhf.data.prompts import EncodedPrompt, prompts_of_step, replacements_of_step, requests_for
from rayrlhf.rewards.score import score_of
from rayrlhf.trajectory import GenerationRequest, SerializedTrajectory

SEEDED_AS = "ppo"
"""A part of the seed of every sample: another word would change what each run draws."""


class StepPrompts:
    """The prompts of the stage `rl`, shared out to steps and to places within them."""

    def __init__(self, prompts: Sequence[EncodedPrompt], config: Config) -> None:
        self.prompts, self.config = list(prompts), config.rl
        self.seed = config.seed

    def groups(self, step: int) -> list[list[GenerationRequest]]:
        """The requests of a step as they are drawn first, by prompt."""
        per_step, samples = self.config.prompts_per_step, self.config.samples_per_prompt
        places = prompts_of_step(len(self.prompts), self.seed, step, per_step, self.config.skip_prompts)
        chosen = [self.prompts[i] for i in places]
        requests = requests_for(chosen, samples, self.seed, SEEDED_AS, step)
        return [requests[i : i + samples] for i in range(0, len(requests), samples)]

    def redraw(
        self, position: int, redraws: int, trajectories: Sequence[SerializedTrajectory]
    ) -> list[GenerationRequest] | None:
        """The requests that take the place of a group; None if it stays in the batch.

        Args:
            position: the place of the group; that of place 0 in step 2 of 8 prompts is 16.
            redraws: how many groups have had the place before.
            trajectories: of the group, scored.
        """
        config = self.config
        if redraws == config.max_redraws:
            return None
        scores = {score_of(t.rewards, t.ended, config.missing_eos_reward) for t in trajectories}
        if len(scores) > 1:
            return None
        step, place = divmod(position, config.prompts_per_step)
        others = replacements_of_step(
            len(self.prompts), self.seed, step, config.prompts_per_step, redraws + 1, config.skip_prompts
        )
        if place >= len(others):  # there are no further prompts
            return None
        prompt = self.prompts[others[place]]
        return requests_for([prompt], config.samples_per_prompt, self.seed, SEEDED_AS, step, "redraw", redraws + 1)

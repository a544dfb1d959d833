"""Statistics of whole games."""

import gymnasium as gym


class EpisodeStatistics(gym.Wrapper):
    """Return and length, in frames, of the whole game, unclipped.

    They are in the info of the reset that follows the game's end, where `ParallelEnvs` looks for them: a game
    can also end inside the reset of an outer wrapper, where nobody sees the step.
    """

    finished: dict | None = None

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        if self.finished:
            info["episode"] = self.finished
        self.finished, self.episodic_return, self.episodic_length = None, 0.0, 0
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.episodic_return += reward
        self.episodic_length += 1
        if terminated or truncated:
            self.finished = {"r": self.episodic_return, "l": self.episodic_length}
        return observation, reward, terminated, truncated, info

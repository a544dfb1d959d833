"""Records a game as it is played."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from imageio_ffmpeg import write_frames

FRAMES_PER_S = 60  # the console's


class RecordGame(gym.Wrapper):
    """Writes the first game to `game.mp4` in a folder, every frame of the emulator, at the console's speed.

    Each frame goes to the encoder at once: kept until the end, as gymnasium's RecordVideo keeps them, those
    of the longest game would take 11 GB. If it cannot be written, the video ends early; the game does not.
    """

    def __init__(self, env: gym.Env, folder: Path):
        super().__init__(env)
        self.folder, self.games_begun, self.writer = folder, 0, None

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self._end()
        if self.games_begun == 0:
            self._begin()
        self.games_begun += 1
        return observation, info

    def step(self, action):
        outcome = self.env.step(action)
        if self.writer:
            self._write()
        return outcome

    def close(self):
        self._end()
        super().close()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        height, width, _ = self.env.render().shape
        self.writer = write_frames(
            str(self.folder / "game.mp4"),
            (width, height),
            pix_fmt_out="yuv420p",  # what browsers play
            fps=FRAMES_PER_S,
            macro_block_size=2,  # of that format; by default frames are enlarged
            ffmpeg_log_level="error",
        )
        self.writer.send(None)
        self._write()

    def _write(self) -> None:
        try:
            self.writer.send(np.ascontiguousarray(self.env.render()))
        except OSError as error:
            reason = str(error).strip().splitlines()[-1]
            print(f"\nwarning: {self.folder / 'game.mp4'} ends early: {reason}", file=sys.stderr)
            self._end()

    def _end(self) -> None:
        if self.writer:
            self.writer.close()
            self.writer = None

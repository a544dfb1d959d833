"""The video of a game has every frame of the first game, written as it is played."""

from collections.abc import Callable
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import psutil
from traced_memory import peak_memory

from cleanrl.utils.games.video import RecordGame

HEIGHT, WIDTH, GAME_LENGTH = 210, 160, 200


class Flicker(gym.Env):
    """Shows frame k of a game in a grey of its own."""

    observation_space, action_space = gym.spaces.Discrete(1), gym.spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return 0, {}

    def step(self, action):
        self.steps += 1
        return 0, 0.0, self.steps == GAME_LENGTH, False, {}

    def render(self):
        return np.full((HEIGHT, WIDTH, 3), self.steps, np.uint8)


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    """Its frames and how many a second, as OpenCV reads them."""
    video, frames = cv2.VideoCapture(str(path)), []
    while (result := video.read())[0]:
        frames.append(result[1])
    return frames, video.get(cv2.CAP_PROP_FPS)


def play(env: gym.Env, games: int) -> None:
    for _ in range(games):
        env.reset()
        while not env.step(0)[2]:
            pass
    env.reset()
    env.close()


def test_every_frame_of_the_first_game_and_no_other_at_the_consoles_speed(tmp_path):
    play(RecordGame(Flicker(), tmp_path / "videos"), games=2)
    (path,) = tmp_path.glob("videos/*")
    frames, frames_per_s = read_video(path)
    greys = [frame.mean() for frame in frames]
    assert frames[0].shape == (HEIGHT, WIDTH, 3)
    assert frames_per_s == 60
    assert path.name == "game.mp4"
    np.testing.assert_allclose(greys, np.arange(GAME_LENGTH + 1), atol=3)  # compression loses a little


def one_game(folder: Path) -> Callable[[], None]:
    env = RecordGame(Flicker(), folder)
    env.reset()  # imports the encoder

    def play_on() -> None:
        for _ in range(GAME_LENGTH - 1):
            env.step(0)

    return play_on


def test_memory_does_not_grow_with_the_game(tmp_path):
    assert peak_memory(one_game, tmp_path) < 5 * HEIGHT * WIDTH * 3


def test_a_game_continues_without_its_video(tmp_path, capfd):
    env = RecordGame(Flicker(), tmp_path)
    env.reset()
    (encoder,) = [child for child in psutil.Process().children() if "ffmpeg" in child.name()]
    encoder.kill()
    encoder.wait()
    while not env.step(0)[2]:
        pass
    env.close()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert line.startswith(f"warning: {Path(tmp_path, 'game.mp4')} ends early: ")


def test_a_game_that_is_not_finished_leaves_a_video_that_can_be_played(tmp_path):
    env = RecordGame(Flicker(), tmp_path)
    env.reset()
    for _ in range(30):
        env.step(0)
    env.close()
    assert len(read_video(tmp_path / "game.mp4")[0]) == 31

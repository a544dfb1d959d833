"""Animations of videos whose frames are known, as ffmpeg reads them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageSequence

from cleanrl.utils.games.animation import animate

WIDTH, HEIGHT = 160, 210


def write_video(path: Path, frames: list[np.ndarray]) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30, (WIDTH, HEIGHT))
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def frame_with_square(column: int, visible: bool = True) -> np.ndarray:
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    if visible:
        frame[100:120, column : column + 20] = (255, 255, 255)
    return frame


def pictures(gif: bytes, folder: Path) -> np.ndarray:
    """(n, height, width, 3)"""
    path = folder / "animation.gif"
    path.write_bytes(gif)
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def test_one_half_sized_picture_for_four_frames_at_the_consoles_speed(tmp_path):
    columns = [4 * (index // 4) for index in range(102)]  # moves with every fourth frame
    video = write_video(tmp_path / "game.mp4", [frame_with_square(column) for column in columns])
    gif, width, height = animate(video)
    assert (width, height) == (80, 105)
    seen = pictures(gif, tmp_path)
    assert seen.shape == (26, 105, 80, 3)  # the last one of two frames
    for index, picture in enumerate(seen):
        bright = np.argwhere(picture.mean(axis=2) > 127)
        top, left = bright.min(axis=0)
        bottom, right = bright.max(axis=0)
        assert (top, bottom) == pytest.approx((50, 59), abs=1)
        assert (left, right) == pytest.approx((2 * index, 2 * index + 9), abs=1)
    with Image.open(tmp_path / "animation.gif") as image:
        assert image.info["duration"] == 60  # ms, in a format that counts tens of them
        assert image.info["loop"] == 0


@pytest.mark.parametrize("phase", [0, 1])
def test_what_shows_in_every_other_frame_shows_in_every_picture(tmp_path, phase):
    frames = [frame_with_square(70, visible=index % 2 == phase) for index in range(40)]
    gif, _, _ = animate(write_video(tmp_path / "game.mp4", frames))
    assert (pictures(gif, tmp_path)[:, 55, 40].mean(axis=1) > 200).all()


def test_a_long_game_is_cut_short_and_small(tmp_path):
    rng = np.random.default_rng(0)
    background = rng.integers(0, 255, (HEIGHT // 10, WIDTH // 10, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    frames = [np.maximum(background, frame_with_square(index % 140)) for index in range(1300)]
    gif, _, _ = animate(write_video(tmp_path / "game.mp4", frames))
    assert len(pictures(gif, tmp_path)) == 300
    assert len(gif) < 1_000_000


def test_a_damaged_video_is_an_error_that_can_be_caught(tmp_path):
    path = tmp_path / "game.mp4"
    path.write_bytes(write_video(tmp_path / "whole.mp4", [frame_with_square(0)] * 8).read_bytes()[:500])
    with pytest.raises(OSError, match=r"game\.mp4"):
        animate(path)

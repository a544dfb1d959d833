"""A game's video as a small animated picture, for TensorBoard."""

import io
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from imageio_ffmpeg import read_frames
from PIL import Image

FRAMES_PER_PICTURE = 4  # those of one action
PICTURE_MS = 1000 * FRAMES_PER_PICTURE // 60  # an Atari shows 60 frames a second
MOST_PICTURES = 300  # 20 seconds of play
NUM_COLOURS = 64


class Animation(NamedTuple):
    """An animated GIF, and its size in pixels."""

    gif: bytes
    width: int
    height: int


def animate(video: Path) -> Animation:
    """The start of a game at half the video's size and the speed of the console, a picture per four frames.

    A picture is the pixel-wise maximum of the last two of its frames, as in what the agent sees: some games
    show a thing only in every other frame.

    Raises:
        OSError: the file is no video.
    """
    with closing(read_frames(str(video))) as contents:
        width, height = next(contents)["size"]
        frames = islice(contents, FRAMES_PER_PICTURE * MOST_PICTURES)
        pictures = []
        while taken := list(islice(frames, FRAMES_PER_PICTURE)):
            newest = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in taken[-2:]]
            pictures.append(Image.fromarray(np.max(newest, axis=0)).reduce(2))
    if not pictures:
        raise OSError(f"{video} has no frames")

    # One palette for all, of pictures from start to end: each with its own would double the file.
    samples = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures[::30]]))
    palette = samples.quantize(NUM_COLOURS)
    first, *others = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    content = io.BytesIO()
    first.save(content, "GIF", save_all=True, append_images=others, duration=PICTURE_MS, loop=0)
    return Animation(content.getvalue(), *first.size)

"""Reads the options and curves of runs from their event files, with TensorBoard's own record reader."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.util.tensor_util import make_ndarray

from cleanrl.utils.bounds import Bounds, shown
from cleanrl.utils.run.charts import (
    EPISODIC_RETURN,
    EPSILON,
    EVALUATION_RETURN,
    OFFLINE_RETURN,
    TEACHER_RETURN,
)

TAGS = (TEACHER_RETURN, OFFLINE_RETURN, EPISODIC_RETURN, EPSILON, EVALUATION_RETURN)
OPTIONS = "hyperparameters/text_summary"
OPTION_ROW = re.compile(r"^\|(\w+)\|(.*)\|$", re.MULTILINE)
MOST_RECORD_BYTES = 2**24  # of an event; its checksum takes a second or two
COUNT = Bounds(0)
LARGEST = float(np.finfo(np.float32).max)  # number in a point


class UnusableError(Exception):
    """A run cannot be used; the message says why."""


class Curve(NamedTuple):
    steps: np.ndarray
    """int64 (n,), ascending"""
    values: np.ndarray
    """float64 (n,)"""


NO_POINTS = Curve(np.empty(0, np.int64), np.empty(0))


def read_curves(paths: Iterable[Path], faults: list[str]) -> tuple[dict[str, str], dict[str, Curve]]:
    """A run's options and curves, from its event files; a resumed run has several.

    Args:
        paths: the files.
        faults: gets a line for each truncated file.

    Raises:
        UnusableError: a file cannot be read or is damaged.
    """
    options: dict[str, str] = {}
    points: dict[str, list[tuple[int, float]]] = {tag: [] for tag in TAGS}
    for path in paths:
        for event in read_events(path, faults):
            for value in event.summary.value:
                if value.tag in points:
                    points[value.tag].append((event.step, number_of(value, event.step)))
                elif value.tag == OPTIONS:
                    for text in value.tensor.string_val:
                        rows = OPTION_ROW.findall(text.decode(errors="replace"))
                        options |= dict(rows[1:])  # below the table's header
    curves = {}
    for tag, of_tag in points.items():
        of_tag.sort(key=lambda point: point[0])
        steps, values = zip(*of_tag, strict=True) if of_tag else NO_POINTS
        curves[tag] = Curve(np.array(steps, np.int64), np.array(values, np.float64))
    return options, curves


def number_of(value: Summary.Value, step: int) -> float:
    """Raises UnusableError if it, or the step, is none that can be plotted."""
    try:
        if value.HasField("simple_value"):
            number = value.simple_value
        elif value.tensor.tensor_shape.dim:  # no scalar; it may claim to be larger than the memory
            raise ValueError
        else:  # TensorFlow's newer writers
            number = float(make_ndarray(value.tensor).item())
    except (KeyError, TypeError, ValueError):
        raise UnusableError(f"damaged: {value.tag} is no number at step {step}") from None
    if not (abs(number) <= LARGEST and COUNT.admit(step)):
        raise UnusableError(f"damaged: {value.tag} is {number} at step {step}")
    return number


class RecordReader(PyRecordReader_New):
    """TensorBoard's, but it reads no record that is too long to be an event."""

    def _read(self, n: int) -> bytes:
        if n > MOST_RECORD_BYTES:
            raise DecodeError
        return super()._read(n)


def read_events(path: Path, faults: list[str]) -> Iterator[Event]:
    """The events of a file. One that ends within a record, as after a power failure, is read up to there.

    TensorBoard itself silently stops at a damaged record and so hides everything after it.
    """
    try:
        reader = RecordReader(str(path))
        while True:
            reader.GetNext()
            yield Event.FromString(reader.record())
    except OutOfRangeError:
        return
    except DataLossError as error:
        if "truncated" not in error.message:
            raise UnusableError(f"damaged: a checksum in {shown(path.name)} is wrong") from None
        faults.append(f"{shown(path.name)} is truncated; its last record is lost")
    except DecodeError:
        raise UnusableError(f"damaged: a record in {shown(path.name)} is not an event") from None
    except UnicodeEncodeError:
        raise UnusableError("its path is not in UTF-8; rename it") from None
    except OSError as error:
        raise UnusableError(f"{shown(path.name)} cannot be read ({error.strerror})") from None

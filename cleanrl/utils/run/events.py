"""TensorBoard's event files, written so that a run can rely on them.

What is flushed is on the disk, which a checkpoint needs to know; a disk that is full costs neither the run
nor a point of a curve: what could not be written waits until there is room.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
from tensorboard.summary.writer.record_writer import RecordWriter

from cleanrl.utils.games.animation import animate

FLUSH_INTERVAL_S = 20.0


class Mirror(Protocol):
    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def add_video(self, tag: str, path: Path, step: int) -> None: ...


class EventWriter:
    """Writes a new event file in a run's folder.

    Args:
        folder: the run's.
        mirror: gets each point of a curve, and each video, as well.
    """

    def __init__(self, folder: Path, mirror: Mirror | None = None):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path, self.mirror = folder / name, mirror
        self._pending: list[bytes] = []
        self._size = 0  # of what is on the disk
        self._next_flush_time = 0.0
        self._add(file_version="brain.Event:2")

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Adds a point of the curve `tag`."""
        value = float(value)
        self._add(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
        if self.mirror:
            self.mirror.add_scalar(tag, value, step)

    def add_options(self, options: dict[str, Any], results: Sequence[str]) -> None:
        """Adds a run's options: a table on the page of texts, `hyperparameters`, and the page "HParams".

        There `results` are the tags whose last values are shown beside the options.
        """
        from tensorboard.plugins.hparams import summary_v2 as hparams  # takes half a second

        table = "\n".join(
            ["|option|value|", "|-|-|", *(f"|{name}|{value}|" for name, value in options.items())]
        )
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        text = Summary.Value(
            tag="hyperparameters/text_summary",
            metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
            tensor=TensorProto(dtype=DT_STRING, string_val=[table.encode()], tensor_shape=shape),
        )
        self._add(summary=Summary(value=[text]))
        values = {name: v if isinstance(v, bool | int | float) else str(v) for name, v in options.items()}
        columns, metrics = map(hparams.HParam, values), map(hparams.Metric, results)
        for page in (hparams.hparams_config_pb(columns, metrics), hparams.hparams_pb(values)):
            self._add(summary=page)

    def add_layout(self, layout: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Adds the page "Custom Scalars": sections by title, their charts by title, each chart's tags."""
        sections = [
            Category(
                title=section,
                chart=[
                    # TensorBoard treats a tag as a regular expression that has to match at the start.
                    Chart(
                        title=title,
                        multiline=MultilineChartContent(tag=[f"{re.escape(tag)}$" for tag in tags]),
                    )
                    for title, tags in charts.items()
                ],
            )
            for section, charts in layout.items()
        ]
        content = Layout(category=sections).SerializeToString()
        value = Summary.Value(
            tag=custom_scalars.CONFIG_SUMMARY_TAG,
            metadata=custom_scalars.create_summary_metadata(),
            tensor=TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=TensorShapeProto()),
        )
        self._add(summary=Summary(value=[value]))

    def add_video(self, tag: str, path: Path, step: int) -> None:
        """Adds the beginning of an mp4 file as an animated picture, on the page of images.

        Raises:
            OSError: the file is no video.
        """
        gif, width, height = animate(path)
        if self.mirror:
            self.mirror.add_video(tag, path, step)
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=gif)
        self._add(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def flush(self) -> bool:
        """Writes all that is not written yet; or nothing, if the disk is full: warns and returns False."""
        self._next_flush_time = time.monotonic() + FLUSH_INTERVAL_S
        try:
            with self.path.open("ab") as file:
                if os.fstat(file.fileno()).st_size > self._size:  # half a record
                    file.truncate(self._size)
                records = RecordWriter(file)
                for event in self._pending:
                    records.write(event)
                file.flush()
                os.fsync(file.fileno())
                self._size = file.tell()
        except OSError as error:
            print(
                f"\nwarning: {self.path} cannot be written to ({error.strerror}): will try again",
                file=sys.stderr,
            )
            with suppress(OSError):  # the disk may have become read-only
                os.truncate(self.path, self._size)
            return False
        self._pending.clear()
        return True

    def _add(self, **content: Any) -> None:
        self._pending.append(Event(wall_time=time.time(), **content).SerializeToString())
        if time.monotonic() >= self._next_flush_time:
            self.flush()

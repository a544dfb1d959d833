"""Zip archives and pickles from strangers, checked before torch reads them."""

import io
import pickle
import pickletools
import zipfile
from contextlib import suppress
from pathlib import PurePosixPath
from typing import BinaryIO

TOO_LARGE = "holds more than any network here; name a file of weights alone."
MOST_BYTES = 2**27  # in a file; twice those of the largest network here
MOST_RECORDS, MOST_OPERATIONS = 10**4, 10**5  # of zips, pickles
NUM_PICKLES = 5  # before torch 1.6: a number, the version, the system, the network, its arrays' names
# What torch lets a pickle call, though no state dict needs it: a few bytes may ask for any memory, or hide a
# tensor's methods.
NEEDLESS = (" bytearray", " encode", " _rebuild_parameter_with_state")


class BadWeightsError(Exception):
    """What is wrong with a file, as it follows its name, and what to do."""


def stable_baselines3_policy(file: BinaryIO) -> io.BytesIO | None:
    """The state dict in a zip file of Stable-Baselines3; None if the file is something else.

    Raises:
        BadWeightsError: it is too large once it is unpacked.
    """
    if not _is_zip(file):
        return None
    with _open_zip(file) as archive:
        policies = [path for path in archive.namelist() if PurePosixPath(path).name == "policy.pth"]
        policy = io.BytesIO(_read_record(archive, policies[0])) if len(policies) == 1 else None
    file.seek(0)
    return policy


def _is_zip(file: BinaryIO) -> bool:
    """As torch decides; `zipfile.is_zipfile` also takes an old pickle with an archive behind it for one."""
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    return is_zip


def _open_zip(file: BinaryIO) -> zipfile.ZipFile:
    file.seek(0)
    if file.read().count(b"PK\x01\x02") > MOST_RECORDS:  # a list of so many takes a minute
        raise BadWeightsError(TOO_LARGE)
    return zipfile.ZipFile(file)


def _read_record(archive: zipfile.ZipFile, name: str) -> bytes:
    record = archive.getinfo(name)
    # Other methods may unpack more than they are asked for.
    is_bounded = record.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not is_bounded or record.file_size > MOST_BYTES:
        raise BadWeightsError(TOO_LARGE)
    with archive.open(record) as file:
        return file.read(record.file_size)


def checked(file: BinaryIO) -> BinaryIO:
    """The file or, of a zip archive, a plain copy, in which torch's reader sees what was checked here.

    Raises:
        BadWeightsError: torch would make more of it than a network is.
    """
    pickles = [file]
    if _is_zip(file):
        with _open_zip(file) as archive:
            if sum(record.file_size for record in archive.infolist()) > MOST_BYTES:
                raise BadWeightsError(TOO_LARGE)
            if all(record.header_offset for record in archive.infolist()):  # the end of another archive
                raise zipfile.BadZipFile
            records = {name: _read_record(archive, name) for name in archive.namelist()}
        pickles = [io.BytesIO(content) for name, content in records.items() if name.endswith(".pkl")]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, content)
    for content in pickles:
        with suppress(ValueError):  # it ends early, or is none of torch's
            for _ in range(NUM_PICKLES):
                for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
                    if count > MOST_OPERATIONS:
                        raise BadWeightsError(TOO_LARGE)
                    if operation.name == "GLOBAL" and argument.endswith(NEEDLESS):
                        raise pickle.UnpicklingError
    file.seek(0)
    return file

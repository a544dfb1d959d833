"""Finds and downloads one file on the Hugging Face Hub; failures come soon and say what to do."""

import hashlib
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from huggingface_hub import (
    HfApi,
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cleanrl.utils.bounds import shown
from cleanrl.utils.hub.client import ask_the_hub, silence_limit_s, without_password

MOST_BYTES = 10**9  # of a file of weights; the largest known are 30 MB


@dataclass
class Advice:
    """What an error advises: the options that name the repo and the file, and the alternative."""

    repo_option: str
    file_option: str
    alternative: str


TEACHER = Advice(
    "--teacher-policy-hf-repo",
    "--teacher-hf-file",
    "train a DQN teacher yourself or pass a local one with --teacher-model-path FILE"
    " (cleanrl/teachers has Pong and Breakout)",
)


def find_file(
    repo_id: str, revision: str | None = None, exp_name: str = "dqn_atari", advice: Advice = TEACHER
) -> str:
    """The name of the file of weights in a model repo.

    In a repo named {env_id}-{exp_name}-seed{n}, as CleanRL's and ours are, it is {exp_name}.cleanrl_model. In
    another one it is what its list of files has: {exp_name}.cleanrl_model of the argument, or a zip file
    named as the repo, as in Stable-Baselines3's zoo, or else the only file of weights that is in no folder.

    Raises:
        SystemExit: with a one-line error if the list cannot be fetched, or has no such file or several.
    """
    name = repo_id.rpartition("/")[2]
    if published := re.fullmatch(r"[A-Za-z0-9]+NoFrameskip-v4-(.+)-seed\d+", name):
        return f"{published[1]}.cleanrl_model"
    try:
        files = ask_the_hub(lambda: _list_files(repo_id, revision), silence_limit_s())
    except Exception as error:
        _refuse(f"list the files of {repo_id}", error, repo_id, revision, advice)
    for usual in (f"{exp_name}.cleanrl_model", f"{name}.zip"):
        if usual in files:
            return usual
    suffixes = (".cleanrl_model", ".safetensors", ".zip", ".pth", ".pt", ".msgpack")
    candidates = [file for file in files if file.endswith(suffixes) and "/" not in file]
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(shown(file) for file in candidates[:5]) or "none"
    raise SystemExit(
        f"error: {repo_id} does not have exactly one file of weights ({found}); name it with"
        f" {advice.file_option}."
    )


def _list_files(repo_id: str, revision: str | None) -> list[str]:
    """The files of a repo, or those in the cache if the Hub cannot be reached."""
    _check_revision(revision)
    try:
        return [
            str(entry.rfilename) for entry in HfApi().model_info(repo_id, revision=revision).siblings or ()
        ]
    except Exception:
        with suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        raise


def download(repo_id: str, filename: str, revision: str | None = None, advice: Advice = TEACHER) -> Path:
    """Returns the path in the Hub's cache of one file of a model repo, downloading it if needed.

    The client's own settings apply (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT,
    HF_HUB_DOWNLOAD_TIMEOUT). If the Hub cannot be reached, a cached file is used.

    Args:
        repo_id: the model repo, user/name.
        filename: the file's name in it.
        revision: a branch, tag or commit; None: the main branch.
        advice: what an error advises.

    Raises:
        SystemExit: with a one-line error that names the repo, the file, the fault and what to do, at most 5 s
            plus three client timeouts (10 s each by default) after the last byte arrived. A slow download
            may take as long as it makes progress.
    """
    work = Download(repo_id, filename, revision)
    try:
        path = ask_the_hub(work.fetch, silence_limit_s(), work.has_grown)
    except Exception as error:
        _refuse(f"download {shown(filename)} from {repo_id}", error, repo_id, revision, advice)
    return Path(path)


class RevisionError(Exception):
    """No branch, tag or commit has that name."""


def _check_revision(revision: str | None) -> None:
    """It becomes part of paths in the cache."""
    if revision is not None and not re.fullmatch(r"(?!.*\.\.)\w[\w./-]*", revision):
        raise RevisionError


def _refuse(task: str, error: Exception, repo_id: str, revision: str | None, advice: Advice) -> NoReturn:
    where = f" at revision {revision}" if revision else ""
    message = f"error: cannot {task}{where}: {_explain(error, repo_id, advice)}; or {advice.alternative}."
    raise SystemExit(without_password(" ".join(message.split()))) from None


def _check_metadata(metadata: HfFileMetadata) -> None:
    """The client makes paths of the first two, and believes the third."""
    is_name = re.compile(r"\w[\w.-]*").fullmatch
    if not (is_name(metadata.etag or "") and is_name(metadata.commit_hash or "")):
        raise FileMetadataError("the file has no usable ETag or commit")
    if not 0 < (metadata.size or 0) <= MOST_BYTES:
        raise FileMetadataError(f"its size is {metadata.size}")


class AlteredError(Exception):
    """A file in the cache is not the one that the Hub has."""


def _check_content(path: str) -> str:
    """Returns the path of a file in the cache. It links to a file named by its ETag, a large one's SHA-256.

    Raises:
        AlteredError: the content has another SHA-256; it has been removed from the cache.
    """
    content = Path(path).resolve()
    if re.fullmatch("[0-9a-f]{64}", content.name):
        with content.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != content.name:
            content.unlink()
            raise AlteredError
    return path


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled | HFValidationError | FileMetadataError)


class Download:
    """One file's way into the cache, and whether more of it has arrived."""

    def __init__(self, repo_id: str, filename: str, revision: str | None):
        self.repo_id, self.filename, self.revision = repo_id, filename, revision
        self.metadata: HfFileMetadata | None = None  # once the Hub has answered
        self._size = 0  # of what has arrived

    def fetch(self) -> str:
        """Asks for the metadata first: that fails with the exact reason, and without long retries."""
        _check_revision(self.revision)
        url = hf_hub_url(self.repo_id, self.filename, revision=self.revision)
        for is_last_try in (False, True):
            try:
                metadata = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
                _check_metadata(metadata)
                self.metadata = metadata
                break
            except (EntryNotFoundError, RevisionNotFoundError):
                raise
            except Exception as error:
                cached = try_to_load_from_cache(self.repo_id, self.filename, revision=self.revision)
                if isinstance(cached, str):
                    return _check_content(cached)
                if is_last_try or not _is_transient(error):
                    raise
                time.sleep(1)
        return _check_content(hf_hub_download(self.repo_id, self.filename, revision=self.revision))

    def has_grown(self) -> bool:
        """Whether more has arrived since the last call; it may be another process that downloads it.

        Raises:
            FileMetadataError: more than the file was said to have.
        """
        if self.metadata is None:
            return False
        blobs = Path(constants.HF_HUB_CACHE) / f"models--{self.repo_id.replace('/', '--')}" / "blobs"
        size = 0
        for path in blobs.glob(f"{self.metadata.etag}*.incomplete"):
            with suppress(FileNotFoundError):  # finished since it was listed
                size = max(size, path.stat().st_size)
        if size > self.metadata.size:
            raise FileMetadataError(
                f"the file has more than the {self.metadata.size} bytes it was said to have"
            )
        has_grown, self._size = size > self._size, size
        return has_grown


def _explain(error: Exception, repo_id: str, advice: Advice) -> str:
    """The fault and what to do about it."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client's own message hides the reason
    endpoint = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match error:
        case OfflineModeIsEnabled():
            return "it is not cached and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE to download it"
        case HFValidationError():
            return f"that is not a repo id like user/name; check {advice.repo_option}"
        case GatedRepoError():
            return f"the repo is gated; accept its terms on {endpoint}/{repo_id} and set HF_TOKEN"
        case EntryNotFoundError():
            return f"the repo has no such file; check {advice.repo_option} and {advice.file_option}"
        case RevisionNotFoundError() | RevisionError():
            return "the repo has no such revision; check the branch, tag or commit"
        case HfHubHTTPError() if status in (401, 403):
            return (
                f"access refused ({status}), the repo is private or does not exist; check"
                f" {advice.repo_option}, and set HF_TOKEN to a token that may read it"
            )
        case RepositoryNotFoundError():
            return f"there is no such repo; check {advice.repo_option}, and set HF_TOKEN if it is private"
        case HfHubHTTPError() if _is_transient(error):
            return f"{endpoint} answered with error {status}; try again later"
        case HfHubHTTPError():
            return f"{endpoint} answered with error {status}; check {advice.repo_option} and HF_ENDPOINT"
        case AlteredError():
            return "it was damaged on its way or in the cache (its SHA-256 is another); try again"
        case FileMetadataError():
            return f"{endpoint} does not answer like the Hub ({error}); check HF_ENDPOINT, proxy and firewall"
        case OSError() if error.errno:
            return f"{error}; check the cache folder {constants.HF_HUB_CACHE} and its disk"
        case json.JSONDecodeError():
            return f"{endpoint} does not answer like the Hub ({error}); check HF_ENDPOINT, proxy and firewall"
        case ValueError():
            return f"{error}; check the name of the file, the proxy and the HF variables"
        case _ if "Timeout" in type(error).__name__:
            return (
                f"{endpoint} stopped answering ({error}); check the connection and HF_ENDPOINT, and try again"
            )
        case _:
            kind = type(error).__name__
            return f"{endpoint}: {kind}: {error}; check the connection and HF_ENDPOINT, and try again"

"""Runs a benchmark's jobs on a Ray cluster, which places them and restarts them when a machine dies."""

import contextlib
import logging
import os
import signal
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import cleanrl
from cleanrl.utils.benchmark.copies import PIECE_BYTES, FolderSender, Home
from cleanrl.utils.benchmark.logs import shorten
from cleanrl.utils.benchmark.plan import Plan
from cleanrl.utils.benchmark.processes import POLL_S, RunProcess
from cleanrl.utils.benchmark.records import Job, State

LOCAL = "local"
START_ONE = "; start a cluster with `ray start --head` first, or use --ray-address local"
CONNECT_S = 10.0
REPORT_S = 1.0
# An HTTP/2 client's first message, with an empty SETTINGS frame; its server answers with one (RFC 9113, 3.4)
SETTINGS, FRAME_HEADER_BYTES = b"\x04", 9
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)
SEND_S = 60.0  # for what is still to be sent when stopping
# What is not copied to the machines from the folder in which the benchmark starts, besides what git ignores.
NOT_CODE = ["/runs/", "/videos/", "/wandb/", ".git/", ".venv/", "venv/", "__pycache__/"]


class ClusterError(Exception):
    """There is no cluster, or it lacks what a run requests; a one-line message."""


def connect(address: str, cpus_per_run: int, gpus_per_run: float) -> None:
    """Connects to an existing cluster, or starts one on this machine if the address is "local".

    Ray copies the current folder to every machine; the runs start in it.

    Raises:
        ClusterError: there is no such cluster, or none of its machines has what a run requests.
    """
    if address.startswith("ray://"):
        raise ClusterError(
            f"--ray-address {address} is an address for Ray Client; start the benchmark on a machine of the"
            " cluster, with --ray-address auto"
        )
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    check_that_it_answers(address)
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={
                "working_dir": str(Path.cwd()),
                "py_modules": [str(Path(cleanrl.__file__).parent)],
                "excludes": NOT_CODE,
            },
        )
    except Exception as error:  # of many types: no cluster, another version of Ray or Python, too much code
        is_none = isinstance(error, ConnectionError | ValueError)
        raise ClusterError(
            f"--ray-address {address}: {one_line(error)}" + (START_ONE if is_none else "")
        ) from None
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(
        machine.get("CPU", 0) >= cpus_per_run and machine.get("GPU", 0) >= gpus_per_run
        for machine in machines
    ):
        have = ", ".join(f"{m.get('CPU', 0):g} CPUs and {m.get('GPU', 0):g} GPUs" for m in machines)
        ray.shutdown()
        raise ClusterError(
            f"--cpus-per-run {cpus_per_run} and --gpus-per-run {gpus_per_run:g}: no machine of the cluster"
            f" has both; its machines have {have}"
        )


def check_that_it_answers(address: str) -> None:
    """Ray itself retries for many minutes and ignores Ctrl-C meanwhile.

    Raises:
        ClusterError: nothing answers there, or not the HTTP/2 server that Ray uses.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":  # then it speaks only after a certificate
                return
            connection.sendall(HTTP2_PREFACE)
            if connection.recv(FRAME_HEADER_BYTES)[3:4] != SETTINGS:
                raise OSError("it is not Ray")
    except (OSError, OverflowError) as error:
        raise ClusterError(f"--ray-address {address} does not answer ({error}){START_ONE}") from None


@ray.remote
def work(plan: Plan, home: Any, variables: dict[str, str], grace_s: float) -> tuple[State, str]:
    """One attempt at a run, in a new folder on a machine that Ray chooses; returns what became of it."""
    # A task whose main thread waits for Ray releases its CPUs meanwhile: one run too many would start.
    with ThreadPoolExecutor(1) as waiting, tempfile.TemporaryDirectory(prefix="benchmark-") as name:

        def ask(method: str, *arguments: Any) -> Any:
            answer = getattr(home, method).remote(plan.name, *arguments)
            return waiting.submit(ray.get, answer).result()

        def call(method: str, *arguments: Any) -> Any:
            return ask(method, beginning.attempt, *arguments)

        beginning = ask("begin", socket.gethostname())
        if beginning.over:
            return beginning.over, ""
        here = Path(name)
        for path in Path.cwd().iterdir():  # the code, as Ray copied it
            (here / path.name).symlink_to(path)
        runs, log = here / "runs", here / f"{plan.name}.log"
        runs.mkdir()
        sender = FolderSender(runs, call)
        sender.fetch(beginning.files)
        process = RunProcess(plan, here, log, beginning.folder, variables, death_signal=signal.SIGKILL)
        try:
            status, sent_log = None, 0
            while status is None:
                status = process.poll(REPORT_S)  # before sending the last of its output
                sent_log, must_stop = report(call, process, log, sent_log)
                if must_stop:
                    process.stop(grace_s)
                if process.run_folder:
                    sender.send(process.run_folder)
            state, message = process.outcome(status)
            if state == "done":
                sender.finish(process.run_folder)
            return state, message
        finally:
            process.kill()


def report(call: Any, process: RunProcess, log: Path, sent: int) -> tuple[int, bool]:
    """Sends the log from `sent` bytes on; returns how many are sent, and whether the run is to stop."""
    with log.open("rb") as content:
        content.seek(sent)
        while True:
            data = content.read(PIECE_BYTES)
            must_stop = call("report", process.folder, data)
            if len(data) < PIECE_BYTES:
                return content.tell() - shorten(log), must_stop


class RayRunner:
    """Runs jobs on the cluster that this process is connected to.

    Args:
        jobs: the runs.
        cpus_per_run, gpus_per_run: what each requests; Ray shows it only its own GPUs.
        retries: how many times a run restarts when its worker process or machine dies.
        variables: environment variables of the runs.
        grace_s: how long a run may take to stop.
    """

    def __init__(
        self,
        jobs: list[Job],
        cpus_per_run: int,
        gpus_per_run: float,
        retries: int,
        variables: dict[str, str],
        grace_s: float,
    ):
        self.retries, self.grace_s = retries, grace_s
        self.is_stopping, self._give_up_time = False, float("inf")
        folder = jobs[0].folder
        self.home = (
            ray.remote(Home)
            .options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    ray.get_runtime_context().get_node_id(), soft=False
                ),
            )
            .remote(
                folder.parent.absolute(),
                {job.plan.name: job.log_path.absolute() for job in jobs},
                {job.plan.name: job.record.folder for job in jobs},
            )
        )
        task = work.options(num_cpus=cpus_per_run, num_gpus=gpus_per_run, max_retries=retries)
        self.jobs = {task.remote(job.plan, self.home, variables, grace_s): job for job in jobs}
        self._attempts: dict[str, int] = {}

    @property
    def is_busy(self) -> bool:
        if self.is_stopping:
            return any(job.record.state == "running" for job in self.jobs.values())
        return bool(self.jobs)

    def step(self) -> None:
        """Waits a little, and records what has started and what has ended."""
        try:
            ended, _ = ray.wait(list(self.jobs), num_returns=len(self.jobs), timeout=POLL_S)
            attempts = ray.get(self.home.newest_attempts.remote())
        except ray.exceptions.RayError as error:
            self._end_all("failed", f"lost the cluster: {first_line(error)}")
            return
        for job in self.jobs.values():
            if attempt := attempts.get(job.plan.name):
                if attempt.number != self._attempts.get(job.plan.name):
                    self._attempts[job.plan.name] = attempt.number
                    job.begin(attempt.node)
                job.show(attempt.folder)
        for task in ended:
            self._end(self.jobs.pop(task), task)
        if time.monotonic() > self._give_up_time:
            self._end_all("stopped", "")

    def _end(self, job: Job, task: Any) -> None:
        try:
            state, message = ray.get(task)
            if job.record.state == "running" or state != "stopped":  # else it never started
                job.end(state, message)
        except ray.exceptions.RayTaskError as error:  # such as a full disk
            job.end("failed", f"{type(error.cause).__name__}: {first_line(error.cause)}")
        except ray.exceptions.RayError as error:
            job.end("failed", f"lost its machine or worker {self.retries + 1} times: {first_line(error)}")

    def _end_all(self, state: State, message: str) -> None:
        for job in self.jobs.values():
            if job.record.state == "running":
                job.end(state, message)
        self.jobs.clear()

    def stop(self) -> None:
        """Asks all runs to save and send a checkpoint and exit; waiting ones are not started any more."""
        self.is_stopping = True
        self._give_up_time = time.monotonic() + self.grace_s + SEND_S
        self.home.stop.remote()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            ray.shutdown()


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Many runs on a real Ray cluster of two nodes on this machine, one of which is killed halfway."""

import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_training
import psutil
import pytest
from many_runs import Benchmark, curve, model, saved_step, starts, the_folder

from cleanrl.utils.games.parallel_envs import available_cores

QUICK_TO_NOTICE = {  # a dead node
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_folder() -> Iterator[Path]:
    """For what Ray and the nodes write; its path is short, as sockets are in it."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def cluster(ray_folder) -> Iterator[Any]:
    """One node with one CPU, which knows nothing about this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # it listens on 127.0.0.1 only
        patch.delenv("PYTHONPATH", raising=False)
        patch.chdir(ray_folder)
        from ray.cluster_utils import Cluster

        settings = {"num_cpus": 1, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE}
        cluster = Cluster(initialize_head=True, head_node_args=settings)
        yield cluster
        cluster.shutdown()


@pytest.fixture(autouse=True)
def no_benchmark_is_left() -> Iterator[None]:
    yield
    Benchmark.end_all()


def node_of(process_id: int) -> int:
    """The process id of the raylet that a run belongs to."""
    return next(p.pid for p in psutil.Process(process_id).parents() if p.name().startswith("raylet"))


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def test_a_run_whose_machine_dies_resumes_elsewhere_from_its_last_checkpoint(cluster, tmp_path):
    second = cluster.add_node(num_cpus=1)
    steps = 120
    options = f"--total-timesteps {steps} --step-s 0.05 --state-bytes 3000000 --checkpoint-interval 0.4"
    driver = Benchmark(tmp_path, options, "--num-seeds", "2", "--ray-address", cluster.address)
    driver.wait_until(lambda: all(the_folder(tmp_path, seed) for seed in (1, 2)))
    driver.wait_until(lambda: all(starts(tmp_path, seed) for seed in (1, 2)))
    nodes = {seed: node_of(starts(tmp_path, seed)[0]["process"]) for seed in (1, 2)}
    assert set(nodes.values()) == {raylet(second), raylet(cluster.head_node)}
    (seed,) = (seed for seed, node in nodes.items() if node == raylet(second))
    driver.wait_until(lambda: saved_step(tmp_path, seed) > 10)
    (first,) = starts(tmp_path, seed)
    assert psutil.pid_exists(first["process"])

    cluster.remove_node(second, allow_graceful=False)
    driver.wait_until(lambda: not psutil.pid_exists(first["process"]))  # it dies with its machine
    shutil.rmtree(first["where"])  # and so does its disk
    arrived = saved_step(tmp_path, seed)

    assert driver.end() == 0, driver.output
    first, again = starts(tmp_path, seed)
    assert first["step"] == 0
    assert again["step"] == arrived
    assert len({first["where"], again["where"], str(tmp_path)}) == 3
    assert not Path(again["where"]).exists()
    other = the_folder(tmp_path, 3 - seed)
    assert again["time"] > float((other / "ended").read_text())  # there is one CPU left
    for seed in (1, 2):
        folder = the_folder(tmp_path, seed)
        assert model(tmp_path, seed) == fake_training.result(seed, steps)
        assert curve(folder) == list(range(1, steps + 1))
        assert not (folder / "checkpoints").exists()
    assert "2 done" in driver.output


def test_a_run_whose_worker_dies_too_often_has_failed_and_the_next_is_done(cluster, tmp_path):
    options = "--total-timesteps 30 --step-s 0.05 --slow-seed 1"  # 150 s, unless it is killed
    driver = Benchmark(
        tmp_path, options, "--num-seeds", "2", "--ray-address", cluster.address, "--retries", "0"
    )
    driver.wait_until(lambda: starts(tmp_path, 1))
    process = psutil.Process(starts(tmp_path, 1)[0]["process"])
    process.parent().kill()
    assert driver.end() == 1, driver.output
    assert not process.is_running()
    (row,) = (line for line in driver.output.splitlines() if "  1  failed  " in line)
    assert "lost its machine or worker 1 times" in row
    assert "2 runs: 1 done, 1 failed" in driver.output
    assert starts(tmp_path, 2)[0]["threads"] == "1"


def test_requests_that_no_machine_meets_are_refused(cluster, tmp_path):
    driver = Benchmark(tmp_path, "", "--ray-address", cluster.address, "--gpus-per-run", "0.25")
    assert driver.end() == 1, driver.output
    assert driver.errors == (
        "error: --cpus-per-run 1 and --gpus-per-run 0.25: no machine of the cluster has both;"
        " its machines have 1 CPUs and 0 GPUs\n"
    )
    assert not the_folder(tmp_path, 1)


def test_a_local_cluster_is_private_and_what_is_stopped_there_resumes_without_it(tmp_path):
    """It listens on this machine only, reports nothing to Ray's makers, and has no dashboard."""
    options = "--total-timesteps 100 --step-s 0.05 --checkpoint-interval 0"  # a checkpoint only when stopped
    on_ray = ["--ray-address", "local", "--cpus-per-run", str(available_cores())]
    driver = Benchmark(tmp_path, options, "--num-seeds", "2", *on_ray)
    driver.wait_until(lambda: starts(tmp_path, 1))
    processes = psutil.Process(driver.process.pid).children(recursive=True)
    addresses = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    commands = {" ".join(process.cmdline()): process for process in processes}
    (server,) = (process for command, process in commands.items() if "/gcs_server " in command)
    assert server.environ()["RAY_USAGE_STATS_ENABLED"] == "0"
    assert all("--disable-frontend" in command for command in commands if "/dashboard.py " in command)
    assert driver.end(signal.SIGINT) == 130, driver.output
    assert "2 runs: 1 stopped, 1 waiting" in driver.output
    assert not psutil.wait_procs(processes, timeout=60)[1]  # Ray ends with it, a little later
    stopped_at = saved_step(tmp_path, 1)
    assert 0 < stopped_at < 100

    driver = Benchmark(tmp_path, options, "--num-seeds", "2", "--workers", "2")
    assert driver.end() == 0, driver.output
    assert [start["step"] for start in starts(tmp_path, 1)] == [0, stopped_at]
    assert model(tmp_path, 1) == fake_training.result(1, 100)
    assert curve(the_folder(tmp_path, 1)) == list(range(1, 101))


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("127.0.0.1:1", "--ray-address 127.0.0.1:1 does not answer"),
        (
            "ray://127.0.0.1:1",
            "an address for Ray Client; start the benchmark on a machine of the cluster",
        ),
        ("nonsense", "--ray-address nonsense: "),
    ],
)
def test_an_unusable_cluster_is_a_one_line_error(cluster, address, fault):
    from cleanrl.utils.benchmark.ray_cluster import (  # after `cluster` has set what Ray reads
        ClusterError,
        connect,
    )

    with pytest.raises(ClusterError, match=re.escape(fault)) as error:
        connect(address, 1, 0.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("greeting", "fault"), [(b"", "timed out"), (b"SSH-2.0-OpenSSH_9.2\r\n", "it is not Ray")]
)
def test_an_address_that_accepts_and_says_nothing_of_a_cluster_is_refused(
    cluster, monkeypatch, greeting, fault
):
    """`cluster` shows that a real one is accepted."""
    from cleanrl.utils.benchmark import ray_cluster

    monkeypatch.setattr(ray_cluster, "CONNECT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as waiting:
        accepted = waiting.submit(server.accept)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check = waiting.submit(lambda: accepted.result()[0].sendall(greeting))
        with pytest.raises(ray_cluster.ClusterError, match=f"{address} does not answer .{fault}"):
            ray_cluster.check_that_it_answers(address)
        check.result()

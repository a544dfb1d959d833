"""Compiles what the JAX script runs on a GPU for an H100, on a machine without one, and says what came of it.

PYTHONPATH=CUDA python tests/benchmarks/jax_for_h100.py

CUDA is a folder with the CUDA packages of requirements/requirements-jax-cuda.txt, about 3 GB (`pip install
--target`). Prints a table, of each program: seconds to compile it; memory that it needs besides its arguments
and results; bytes of its arguments that it updates in place; kernels that it launches, and in each round of
its loop; its loops of a length that only the device knows, for which the host would have to wait.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import cleanrl.qdagger_dqn_atari_jax_impalacnn as script
from cleanrl.utils.replay import frames_jax

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 20 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
NUM_ACTIONS, NUM_ENVS, NUM_FRAMES = 6, 8, 1_000_000
# Instructions of a compiled program that launch a kernel or a copy.
LAUNCH = re.compile(
    r"= \S.*? (fusion|custom-call|copy|copy-start|reduce|convolution|dot|scatter|sort|iota|broadcast|gather|"
    r"dynamic-slice|dynamic-update-slice|select|compare|add|multiply|convert|pad|transpose)\("
)


def programs(gpu: SingleDeviceSharding) -> Iterator[tuple[str, Any]]:
    """Names and lowered programs."""

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype), sharding=gpu)

    def on_gpu(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: array(np.shape(leaf), leaf.dtype), tree)

    args = script.Args(num_envs=NUM_ENVS, buffer_size=1000)
    with redirect_stdout(sys.stderr):
        state = script.create_train_state(args, NUM_ACTIONS, jax.devices("cpu")[0])
    learner, frames = on_gpu(state.learner), array((NUM_FRAMES, 84, 84), np.uint8)
    network = script.TeacherNetwork(NUM_ACTIONS)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4, 84, 84), jnp.uint8))
    teacher = script.QFunction(on_gpu(shapes), network)
    observations = array((NUM_ENVS, 4, 84, 84), np.uint8)
    for k in (10, 2):
        one, stacks = (k, args.batch_size), array((k, args.batch_size, 4), np.int64)
        real = array(one, np.float32)
        batches = script.Batch(
            stacks, array(one, np.int64), real, stacks, real, real, array((*one, NUM_ACTIONS), np.float32)
        )
        yield (
            f"{k} gradient steps",
            script.update.lower(args, learner, frames, batches, array((k,), np.float32)),
        )
    yield "acting, with the teacher", script.forward.lower((learner.student, teacher), observations)
    yield "target network", script.move_target_network.lower(learner, tau=1.0)
    slots = array((NUM_ENVS,), np.int64)
    yield "adding a step", frames_jax._write.lower(frames, slots, array((NUM_ENVS, 84, 84), np.uint8))


def computations(program: str) -> dict[str, list[str]]:
    """The instructions of each computation of a compiled program, by its name; ENTRY is where it starts."""
    found: dict[str, list[str]] = {}
    for line in program.splitlines():
        heading = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if heading:
            instructions = found.setdefault("ENTRY" if heading[1] else heading[2], [])
        elif line.startswith("  "):
            instructions.append(line)
    return found


def launches(parts: dict[str, list[str]], name: str) -> int:
    """Of a computation and of those that it calls, but not of its loops' rounds."""
    total = 0
    for line in parts[name]:
        total += bool(LAUNCH.search(line))
        for called in re.findall(r" call\(.*to_apply=%?([\w.\-]+)", line):
            total += launches(parts, called)
    return total


def describe(name: str, lowered: Any) -> str:
    start_time = time.perf_counter()
    compiled = lowered.compile()
    seconds, memory = time.perf_counter() - start_time, compiled.memory_analysis()
    parts = computations(compiled.as_text())
    loops = [line for lines in parts.values() for line in lines if " while(" in line]
    rounds = [launches(parts, body) for line in loops for body in re.findall(r"body=%?([\w.\-]+)", line)]
    unknown = sum("known_trip_count" not in line for line in loops)
    cells = [
        name,
        f"{seconds:.0f}",
        f"{memory.temp_size_in_bytes / 1e6:,.1f}",
        f"{memory.alias_size_in_bytes / 1e6:,.1f}",
        launches(parts, "ENTRY"),
        max(rounds, default=0),
        unknown,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", target_config=H100, topology="1x1x1"
    )
    jax.default_backend = lambda: "gpu"  # what the script asks to decide how far it unrolls its loop
    print("| | compilation, s | memory, MB | in place, MB | launches | of a round | unknown loops |")
    print("|---" * 7 + "|")
    for name, lowered in programs(SingleDeviceSharding(topology.devices[0])):
        print(describe(name, lowered), flush=True)


if __name__ == "__main__":
    main()

"""What is measured, the baseline and both scripts, behind the same few requests; and the machine's limits.

python tests/benchmarks/programs.py {baseline,torch,torch-eager,jax,jax-autotuned,limits} {cpu,cuda} NUM_ENVS

Each program is a process of its own, as PyTorch and JAX would take the cores from each other. It says "ready"
once the teacher has made its first step, then answers requests on standard input, lines of `NAME AMOUNT…`,
with a line of JSON each on standard output. In between it does nothing, so several may wait side by side.
"""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ENV_ID, NUM_ACTIONS = "PongNoFrameskip-v4", 6
TEACHER = ROOT / "cleanrl/teachers/PongNoFrameskip-v4.safetensors"
BUFFER_SIZE = 60_000  # while the phases are timed
FULL_BUFFER_SIZE = 1_000_000  # the scripts' default, whose memory is counted
FRAMES_PER_STEP = 4
TRAIN_FREQUENCY = 4  # online environment steps per gradient step, the scripts' default
WARM_UP_STEPS = {  # online, until JAX has compiled every number of gradient steps at a time
    "cpu": {"fill": 400, "offline": 20, "online": 32},
    "cuda": {"fill": 400, "offline": 20, "online": 2000},
}
ADDS, SAMPLES = 1000, 300  # that are timed


class Program:
    """A process with one of the programs; a context manager that ends it.

    Args:
        name: baseline, torch, torch-eager (without CUDA graphs), jax, jax-autotuned (the fastest algorithms,
            not deterministic ones) or limits.
        device: cpu or cuda.
        num_envs: environments of a script.
    """

    def __init__(self, name: str, device: str, num_envs: int = 8):
        self.name = name
        command = [sys.executable, __file__, name, device, str(num_envs)]
        start_time = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TQDM_DISABLE": "1"},
        )
        self._read()
        self.startup_s = time.perf_counter() - start_time
        """from the start of the process until the teacher has made its first step: imports, environments,
        networks, what JAX compiles for it, the step"""

    def ask(self, request: str, *amounts: int) -> Any:
        print(request, *amounts, file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the {self.name} program ended; its output is above")
        return json.loads(line)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def create_args(script: Any, device: str, num_envs: int, **options: Any) -> Any:
    """The settings that are measured: the script's defaults, learning from the first online step on."""
    return script.Args(
        env_id=ENV_ID,
        teacher_model_path=TEACHER,
        num_envs=num_envs,
        buffer_size=BUFFER_SIZE,
        learning_starts=0,
        offline_eval_frequency=10**9,
        cuda=device == "cuda",
        save_model=False,
        checkpoint_interval=0,
        **options,
    )


class ScriptPhases(ExitStack):
    """A script's own phases, each for a number of steps; a context manager that ends its environments.

    What the two frameworks need done differently is in the classes below.
    """

    def __init__(self, script_name: str, device: str, num_envs: int, **options: Any):
        super().__init__()
        from cleanrl.utils.games.parallel_envs import ParallelEnvs
        from cleanrl.utils.shell import prepare_command

        prepare_command()  # as a script does when it is started
        self.script = importlib.import_module(f"cleanrl.{script_name}")
        self.args = create_args(self.script, device, num_envs, **options)
        learn = self.script.learn
        # Phases are of different lengths; other options would be compiled for, or captured, once more.
        self.script.learn = lambda args, *others: learn(self.args, *others)
        self.device = self.script.choose_device(self.args)
        self.envs = self.enter_context(ParallelEnvs([partial(self.script.make_env, ENV_ID)] * num_envs))
        self.teacher = self.script.load_teacher(self.args, NUM_ACTIONS, self.device)
        self.state = self.script.create_train_state(self.args, NUM_ACTIONS, self.device)
        self.run = self.enter_context(start_run(self))
        self.fill(num_envs)

    def fill(self, steps: int) -> None:
        self.state.teacher_step = 0  # ε falls anew
        args = replace(self.args, teacher_steps=steps)
        self.script.fill_teacher_replay(args, self.state, self.teacher, self.run)

    def offline(self, gradient_steps: int) -> None:
        args = replace(self.args, offline_steps=self.state.offline_step + gradient_steps)
        self.script.train_offline(args, self.state, self.run)

    def online(self, steps: int) -> None:
        args = replace(self.args, total_timesteps=self.state.online_step + steps)
        self.script.train_online(args, self.state, self.teacher, self.run)

    def evaluate(self, games: int, max_game_frames: int) -> None:
        from cleanrl.utils.evaluation import evaluate

        make_game = partial(self.script.make_env, ENV_ID)
        q_values = partial(self.script.compute_q_values, self.teacher)
        evaluate(make_game, q_values, games, 0, self.args.end_e, max_game_frames)

    def create_replay(self, capacity: int) -> Any:
        def make_frames(num_slots: int) -> Any:
            return self.frames_type(num_slots, self.device)

        args = self.args
        return self.script.ReplayBuffer(
            capacity, args.num_envs, make_frames, NUM_ACTIONS, args.n_step, args.gamma
        )

    def replay_bytes(self) -> int:
        """Of a buffer of full size, as the script computes it; none is made."""
        return self.create_replay(FULL_BUFFER_SIZE).num_bytes

    def time_replay(self, stored: int) -> dict[str, float]:
        """Microseconds that a full buffer of so many frames takes to add one step of all environments, and to
        draw and gather one batch.
        """
        import numpy as np

        from cleanrl.utils.games.parallel_envs import StepResult

        num_envs = self.args.num_envs
        rng = np.random.default_rng(0)
        observations = rng.integers(0, 256, (num_envs, 4, 84, 84), np.uint8)
        nowhere = np.zeros(num_envs, dtype=bool)
        step = StepResult(observations, np.ones(num_envs, np.float32), nowhere, nowhere, observations, [])
        actions, q_values = np.zeros(num_envs, dtype=int), np.zeros((num_envs, NUM_ACTIONS), np.float32)
        replay = self.create_replay(stored)
        replay.start(np.zeros_like(observations))

        def add(number: int) -> None:
            for _ in range(number):
                replay.add(actions, step, q_values)
            self.wait_for(replay.frames.frames)

        gather = self.compiled(lambda frames, *stacks: [frames[of_batch] for of_batch in stacks])

        def sample(number: int) -> None:
            for _ in range(number):
                frames, batch = replay.frames.place(replay.sample(self.args.batch_size, rng), self.device)
                self.wait_for(gather(frames, batch.stacks, batch.next_stacks))

        add(stored // num_envs)
        add_s = seconds_of(lambda: add(ADDS))
        sample(1)
        sample_s = seconds_of(lambda: sample(SAMPLES))
        return {"add_us": add_s / ADDS * 1e6, "sample_us": sample_s / SAMPLES * 1e6}

    def prepare(self) -> None:
        """Makes the empty buffer that the next online phase takes."""
        self.state.student_replay.free()
        self.state.student_replay.start(self.envs.observations[:, -1:].repeat(4, axis=1))
        self.synchronize()


class TorchPhases(ScriptPhases):
    def compiled(self, function: Callable) -> Callable:
        return function

    @property
    def frames_type(self) -> type:
        return self.script.TorchFrames

    def update_flops(self) -> int:
        return count_flops(self.learn)

    def is_captured(self) -> bool:
        """Whether its gradient steps are launched as a CUDA graph."""
        from cleanrl.utils.gpu_torch import OneLaunch

        return OneLaunch.enabled and self.script.update.graph.graph is not None

    def update_launches(self) -> tuple[int, int]:
        """Of a gradient step with fused Adam, as on a GPU: its operators, and about as many kernels."""
        import torch

        from cleanrl.utils.gpu_torch import OneLaunch

        own, was_enabled = self.state.optimizer, OneLaunch.enabled
        self.state.optimizer = torch.optim.Adam(self.state.student.parameters(), lr=1e-4, fused=True)
        OneLaunch.enabled = False  # a graph has no operators, and the other optimizer
        self.learn()  # Adam makes its moments
        counts = count_launches(self.learn)
        self.state.optimizer, OneLaunch.enabled = own, was_enabled
        return counts

    def learn(self) -> None:
        self.script.learn(self.args, self.state, self.state.teacher_replay, [1.0])

    def peak_bytes(self) -> int:
        """The most memory of the GPU that tensors have taken so far."""
        import torch

        return torch.cuda.max_memory_allocated()

    def wait_for(self, array: Any) -> None:
        wait_for_torch(self.device)

    def synchronize(self) -> None:
        wait_for_torch(self.device)


class JaxPhases(ScriptPhases):
    def compiled(self, function: Callable) -> Callable:
        import jax

        return jax.jit(function)

    @property
    def frames_type(self) -> type:
        return self.script.JaxFrames

    def wait_for(self, array: Any) -> None:
        import jax

        jax.block_until_ready(array)

    def synchronize(self) -> None:
        import jax

        jax.block_until_ready((self.state.learner, self.state.student_replay.frames.frames))


def start_run(phases: ScriptPhases) -> Any:
    """A run in ./runs whose environments have started already, and which skips the student's evaluations."""
    from cleanrl.utils.run.training_run import TrainingRun

    class MeasuredRun(TrainingRun):
        @contextmanager
        def open_envs(self, num_envs: int, seed: Sequence[int]) -> Iterator[Any]:
            phases.envs.reset(seed)
            yield phases.envs

        def play(self, *_: object) -> list[float]:
            return [0.0]

    script = phases.script
    return MeasuredRun(phases.args, Path(script.__file__), phases.state, script.make_env, model="ema_student")


class BaselinePhases:
    def __init__(self, device: str):
        import torch
        from baseline import Baseline, create_replay

        import cleanrl.qdagger_dqn_atari_impalacnn as script

        self.device = torch.device(device)
        self.loop = Baseline(create_args(script, device, num_envs=1), self.device)
        self.fill, self.offline, self.evaluate = self.loop.fill, self.loop.offline, self.loop.evaluate
        self.create_replay = partial(create_replay, BUFFER_SIZE, self.loop.env, self.device)
        self.fill(1)

    def online(self, steps: int) -> None:
        self.loop.online(steps, self.online_replay)

    def prepare(self) -> None:
        self.online_replay = self.create_replay()

    def replay_bytes(self) -> int:
        from baseline import replay_bytes

        return replay_bytes(FULL_BUFFER_SIZE, self.loop.env)

    def update_flops(self) -> int:
        batch = self.loop.replay.sample(self.loop.args.batch_size)
        return count_flops(lambda: self.loop.update(batch, distill_coeff=1.0))

    def synchronize(self) -> None:
        wait_for_torch(self.device)


class Limits:
    """What the machine can do at best of the work that the phases consist of."""

    def __init__(self, device: str):
        self.device = device

    def flops_per_s(self) -> float:
        """Floating-point operations per second of a large float32 matrix product, the best of 8."""
        import torch

        size = 16_384 if self.device == "cuda" else 2048
        factor = torch.rand(size, size, device=self.device)

        def multiply() -> None:
            factor @ factor
            wait_for_torch(torch.device(self.device))

        return 2 * size**3 / min(seconds_of(multiply) for _ in range(8))

    def frames_per_s(self) -> float:
        """Frames per second of ALE's bare `act` with random actions, in one process per core, added up."""
        from cleanrl.utils.games.parallel_envs import available_cores

        cores = available_cores()
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            pool.map(act, [0.1] * cores, chunksize=1)
            return sum(pool.map(act, [2.0] * cores, chunksize=1))


def act(duration_s: float) -> float:
    """Frames per second of `act` alone, in this process."""
    import ale_py
    import gymnasium as gym
    import numpy as np

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no greeting
    gym.register_envs(ale_py)
    env = gym.make(ENV_ID)
    env.reset(seed=0)
    ale = env.unwrapped.ale
    actions = np.random.default_rng(0).choice(ale.getMinimalActionSet(), 256).tolist()
    frames, start_time = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - start_time) < duration_s:
        for action in actions:
            ale.act(action)
            if ale.game_over():
                ale.reset_game()
        frames += len(actions)
    return frames / elapsed_s


def seconds_of(work: Callable[[], Any]) -> float:
    start_time = time.perf_counter()
    work()
    return time.perf_counter() - start_time


def wait_for_torch(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def count_flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in `work`, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# Kernels of an operator that launches more than one on a GPU, as far as its profiles show.
KERNELS = {"convolution": 2, "convolution_backward": 3, "_fused_adam_": 2}


def count_launches(work: Callable[[], Any]) -> tuple[int, int]:
    """The operators in `work`, and about how many kernels they would launch on a GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Count(TorchDispatchMode):
        operators = launches = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            output = operator(*args, **(kwargs or {}))
            self.operators += 1
            name = operator.overloadpacket.__name__
            is_view = any(result.alias_info for result in operator._schema.returns)
            if tree_leaves(output) and (operator._schema.is_mutable or not is_view) and name != "empty":
                self.launches += KERNELS.get(name, 1)
            return output

    with Count() as count:
        work()
    return count.operators, count.launches


class Requests:
    """What a process answers."""

    def __init__(self, program: Any, device: str):
        self.program, self.warm_up_steps = program, WARM_UP_STEPS[device]
        self.is_warm: set[str] = set()

    def answer(self, request: str, *amounts: int) -> Any:
        if request in self.warm_up_steps:
            return self.time_phase(request, *amounts)
        if request == "evaluate":
            return self.time_games(*amounts)
        return getattr(self.program, request)(*amounts)

    def time_phase(self, name: str, steps: int) -> float:
        """Steps per second of a phase; what is compiled or first touched before it does not count."""
        phase = getattr(self.program, name)
        for earlier in ("fill", name):  # without a teacher's play there is nothing to learn from
            if earlier not in self.is_warm:
                self.program.prepare()
                getattr(self.program, earlier)(self.warm_up_steps[earlier])
                self.is_warm.add(earlier)
        self.program.prepare()
        return steps / seconds_of(lambda: [phase(steps), self.program.synchronize()])

    def time_games(self, games: int, max_game_frames: int) -> float:
        """Games per minute, each cut off after so many frames; the start of the workers counts."""
        if "evaluate" not in self.is_warm:
            self.program.evaluate(games, max_game_frames // 20)
            self.is_warm.add("evaluate")
        return 60 * games / seconds_of(lambda: self.program.evaluate(games, max_game_frames))


def serve(name: str, device: str, num_envs: int) -> None:
    replies = sys.stdout
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the scripts' own prints
    programs: dict[str, Callable[[], Any]] = {
        "baseline": partial(BaselinePhases, device),
        "torch": partial(TorchPhases, "qdagger_dqn_atari_impalacnn", device, num_envs),
        "torch-eager": partial(
            TorchPhases, "qdagger_dqn_atari_impalacnn", device, num_envs, cuda_graphs=False
        ),
        "jax": partial(JaxPhases, "qdagger_dqn_atari_jax_impalacnn", device, num_envs),
        "jax-autotuned": partial(
            JaxPhases, "qdagger_dqn_atari_jax_impalacnn", device, num_envs, torch_deterministic=False
        ),
        "limits": partial(Limits, device),
    }
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch), ExitStack() as resources:
        program = programs[name]()
        if isinstance(program, ScriptPhases):
            resources.enter_context(program)
        say = partial(print, file=replies, flush=True)
        say(json.dumps("ready"))
        requests = Requests(program, device)
        for line in sys.stdin:
            request, *amounts = line.split()
            say(json.dumps(requests.answer(request, *map(int, amounts))))


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))

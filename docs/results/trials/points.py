"""Steps between the points of a student's games of Pong, and where the teacher would have played otherwise.

    PYTHONPATH=. python docs/results/trials/points.py runs/…/quick.cleanrl_model > points.json

Prints, for each of ten games, every point as [steps since the previous point, 1 if won or -1 if lost,
largest gap]; a gap is how far the teacher's Q-value of the student's action is below that of its own.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

from cleanrl import qdagger_dqn_atari_impalacnn as qdagger
from cleanrl.utils.games.parallel_envs import ParallelEnvs

ENV_ID, NUM_GAMES, EPSILON, SEED = "PongNoFrameskip-v4", 10, 0.01, 1000
TEACHER = Path(qdagger.__file__).parent / "teachers" / f"{ENV_ID}.safetensors"


def load(path: Path) -> qdagger.Teacher:
    return qdagger.load_teacher(qdagger.Args(teacher_model_path=path), 6, qdagger.torch.device("cpu"))


def main(student: qdagger.Teacher, teacher: qdagger.Teacher) -> None:
    make_env = partial(qdagger.make_env, ENV_ID)
    rng = np.random.default_rng(SEED)
    games: list[list[tuple[int, int, float]]] = [[] for _ in range(NUM_GAMES)]
    steps, largest_gaps = np.zeros(NUM_GAMES, int), np.zeros(NUM_GAMES)
    unfinished = np.ones(NUM_GAMES, bool)
    with ParallelEnvs([make_env] * NUM_GAMES, probe_fn=make_env) as envs:
        observations = envs.reset(SEED)
        while unfinished.any():
            q_values = qdagger.compute_q_values(student, observations)
            teacher_q_values = qdagger.compute_q_values(teacher, observations)
            actions = q_values.argmax(axis=1)
            gaps = teacher_q_values.max(axis=1) - teacher_q_values[np.arange(NUM_GAMES), actions]
            envs.step_async(qdagger.epsilon_greedy(rng, EPSILON, q_values))
            result = envs.step_wait()
            observations = result.observations
            steps, largest_gaps = steps + 1, np.maximum(largest_gaps, gaps)
            for game in np.flatnonzero(unfinished & (result.rewards != 0)):
                point = int(steps[game]), int(result.rewards[game]), round(float(largest_gaps[game]), 3)
                games[game].append(point)
                steps[game] = largest_gaps[game] = 0
            for finished in result.finished_games:
                unfinished[finished.env_index] = False
    print(json.dumps(games))


if __name__ == "__main__":
    main(load(Path(sys.argv[1])), load(TEACHER))

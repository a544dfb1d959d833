"""What is known of the Atari games: ids, actions, the scores of the random player and of a human."""

import difflib
import re

import ale_py
import gymnasium as gym

from cleanrl.utils.bounds import shown

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner

# Mean return of a player who acts at random (Mnih et al., 2015; Agarwal et al., 2022).
# Not in the papers: docs/results/random.
MEASURED = ("Adventure", "AirRaid", "Carnival", "ElevatorAction", "JourneyEscape", "Pooyan")
RANDOM_SCORES = {
    "Adventure": 0.0,
    "AirRaid": 470.0,
    "Alien": 227.8,
    "Amidar": 5.8,
    "Assault": 222.4,
    "Asterix": 210.0,
    "Asteroids": 719.1,
    "Atlantis": 12850.0,
    "BankHeist": 14.2,
    "BattleZone": 2360.0,
    "BeamRider": 363.9,
    "Berzerk": 123.7,
    "Bowling": 23.1,
    "Boxing": 0.1,
    "Breakout": 1.7,
    "Carnival": 804.0,
    "Centipede": 2090.9,
    "ChopperCommand": 811.0,
    "CrazyClimber": 10780.5,
    "Defender": 2874.5,
    "DemonAttack": 152.1,
    "DoubleDunk": -18.6,
    "ElevatorAction": 6830.0,
    "Enduro": 0.0,
    "FishingDerby": -91.7,
    "Freeway": 0.0,
    "Frostbite": 65.2,
    "Gopher": 257.6,
    "Gravitar": 173.0,
    "Hero": 1027.0,
    "IceHockey": -11.2,
    "Jamesbond": 29.0,
    "JourneyEscape": -23156.7,
    "Kangaroo": 52.0,
    "Krull": 1598.0,
    "KungFuMaster": 258.5,
    "MontezumaRevenge": 0.0,
    "MsPacman": 307.3,
    "NameThisGame": 2292.3,
    "Phoenix": 761.4,
    "Pitfall": -229.4,
    "Pong": -20.7,
    "Pooyan": 450.2,
    "PrivateEye": 24.9,
    "Qbert": 163.9,
    "Riverraid": 1338.5,
    "RoadRunner": 11.5,
    "Robotank": 2.2,
    "Seaquest": 68.4,
    "Skiing": -17098.1,
    "Solaris": 1236.3,
    "SpaceInvaders": 148.0,
    "StarGunner": 664.0,
    "Surround": -10.0,
    "Tennis": -23.8,
    "TimePilot": 3568.0,
    "Tutankham": 11.4,
    "UpNDown": 533.4,
    "Venture": 0.0,
    "VideoPinball": 0.0,
    "WizardOfWor": 563.5,
    "YarsRevenge": 3092.9,
    "Zaxxon": 32.5,
}

# Mean return of a professional human tester (Wang et al., 2016, "Dueling Network Architectures for Deep
# Reinforcement Learning", its table for starts with no-ops), the field's usual 1 of human-normalised scores.
# VideoPinball is left out: that table goes with a random player's 16,256.9 there, not with the 0 above.
HUMAN_SCORES = {
    "Alien": 7127.7,
    "Amidar": 1719.5,
    "Assault": 742.0,
    "Asterix": 8503.3,
    "Asteroids": 47388.7,
    "Atlantis": 29028.1,
    "BankHeist": 753.1,
    "BattleZone": 37187.5,
    "BeamRider": 16926.5,
    "Berzerk": 2630.4,
    "Bowling": 160.7,
    "Boxing": 12.1,
    "Breakout": 30.5,
    "Centipede": 12017.0,
    "ChopperCommand": 7387.8,
    "CrazyClimber": 35829.4,
    "Defender": 18688.9,
    "DemonAttack": 1971.0,
    "DoubleDunk": -16.4,
    "Enduro": 860.5,
    "FishingDerby": -38.7,
    "Freeway": 29.6,
    "Frostbite": 4334.7,
    "Gopher": 2412.5,
    "Gravitar": 3351.4,
    "Hero": 30826.4,
    "IceHockey": 0.9,
    "Jamesbond": 302.8,
    "Kangaroo": 3035.0,
    "Krull": 2665.5,
    "KungFuMaster": 22736.3,
    "MontezumaRevenge": 4753.3,
    "MsPacman": 6951.6,
    "NameThisGame": 8049.0,
    "Phoenix": 7242.6,
    "Pitfall": 6463.7,
    "Pong": 14.6,
    "PrivateEye": 69571.3,
    "Qbert": 13455.0,
    "Riverraid": 17118.0,
    "RoadRunner": 7845.0,
    "Robotank": 11.9,
    "Seaquest": 42054.7,
    "Skiing": -4336.9,
    "Solaris": 12326.7,
    "SpaceInvaders": 1668.7,
    "StarGunner": 10250.0,
    "Surround": 6.5,
    "Tennis": -8.3,
    "TimePilot": 5229.2,
    "Tutankham": 167.6,
    "UpNDown": 11693.2,
    "Venture": 1187.5,
    "WizardOfWor": 4756.5,
    "YarsRevenge": 54576.9,
    "Zaxxon": 9173.3,
}

GAME_LISTS = {
    # Of the papers' tables, but for Surround, which has no such id.
    "atari57": [f"{game}NoFrameskip-v4" for game in RANDOM_SCORES if game not in ("Surround", *MEASURED)],
    # Those from which the median over all can be predicted best (Aitchison et al., 2023, "Atari-5").
    "atari5": [
        f"{game}NoFrameskip-v4" for game in ("BattleZone", "DoubleDunk", "NameThisGame", "Phoenix", "Qbert")
    ],
}


def check_game(env_id: str) -> None:
    """Raises SystemExit with a one-line error, unless it is a {Game}NoFrameskip-v4 with discrete actions."""
    atari_ids = [name for name, spec in gym.registry.items() if spec.entry_point == "ale_py.env:AtariEnv"]
    known_ids = [name for name in atari_ids if name.endswith("NoFrameskip-v4") and "-ram" not in name]
    if env_id not in known_ids:
        is_other_game = env_id in gym.registry and env_id not in atari_ids
        fault = "is not an Atari game" if is_other_game else "is not known"
        game = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-.*)?$", "", env_id)
        games = [name.removesuffix("NoFrameskip-v4") for name in known_ids]
        similar = difflib.get_close_matches(game, games, n=1)
        hint = "use a {Game}NoFrameskip-v4, such as BreakoutNoFrameskip-v4"
        if similar:
            hint = f"did you mean {similar[0]}NoFrameskip-v4?"
        raise SystemExit(f"error: --env-id {shown(env_id)} {fault}; {hint}")
    env = gym.make(env_id)
    action_space = env.action_space
    env.close()
    if not isinstance(action_space, gym.spaces.Discrete):
        raise SystemExit(
            f"error: --env-id {env_id} has the actions {action_space}; only Discrete ones can be learned"
        )


def random_return(env_id: str, return_normalization: str) -> float:
    """What the distillation coefficient measures returns from: the random player's return, or 0 if "none"."""
    return 0.0 if return_normalization == "none" else RANDOM_SCORES[env_id.removesuffix("NoFrameskip-v4")]


def check_teacher_return(env_id: str, return_normalization: str, teacher_return: float) -> None:
    """Raises SystemExit with a one-line error if λ is undefined for a teacher of that return."""
    baseline = random_return(env_id, return_normalization)
    if teacher_return <= baseline:
        fault = f"the teacher's mean return, {teacher_return:.2f}, is not above {baseline}: λ is undefined"
        beats_random = teacher_return > random_return(env_id, "random")
        remedy = "--return-normalization random" if beats_random else "a better teacher"
        raise SystemExit(f"error: {fault}; use {remedy}")

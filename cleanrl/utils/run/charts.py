"""Every curve: its tag, what it shows, and the charts that show curves together."""

TEACHER_RETURN = "charts/teacher/avg_episodic_return"
OFFLINE_RETURN = "charts/offline/avg_episodic_return"
ONLINE_RETURN = "charts/online/avg_episodic_return"
EPISODIC_RETURN = "charts/episodic_return"
DISTILL_COEFF = "charts/distill_coeff"
EPSILON = "charts/epsilon"
EVALUATION_RETURN = "eval/episodic_return"
FINAL_RETURN = "eval/avg_episodic_return"

TAGS = {
    TEACHER_RETURN: "mean return of the teacher's evaluation games",
    OFFLINE_RETURN: "mean return of the student's evaluation games, offline",
    ONLINE_RETURN: "mean return of the evaluation games, online",
    EPISODIC_RETURN: "return of a finished game, unclipped",
    "charts/episodic_length": "its length in emulator frames",
    "charts/offline/loss": "TD loss plus weighted distillation loss",
    "charts/offline/q_loss": "TD loss",
    "charts/offline/distill_loss": "distillation loss",
    "losses/loss": "TD loss plus weighted distillation loss",
    "losses/td_loss": "TD loss",
    "losses/distill_loss": "distillation loss",
    "losses/q_values": "mean of Q(s, a) over the batch",
    DISTILL_COEFF: "distillation coefficient λ",
    EPSILON: "ε",
    "charts/SPS": "environment steps per second",
    EVALUATION_RETURN: "return of each game of the final evaluation, over the game's number",
    FINAL_RETURN: "their mean",
}

RESULTS = [FINAL_RETURN, TEACHER_RETURN, OFFLINE_RETURN]  # TensorBoard's page "HParams"

CHARTS = {  # TensorBoard's page "Custom Scalars": sections, their charts, each chart's tags
    "returns": {
        "teacher, offline and online": [TEACHER_RETURN, OFFLINE_RETURN, ONLINE_RETURN, EPISODIC_RETURN]
    },
    "losses, offline and online": {
        "TD loss": ["charts/offline/q_loss", "losses/td_loss"],
        "distillation loss": ["charts/offline/distill_loss", "losses/distill_loss"],
        "sum": ["charts/offline/loss", "losses/loss"],
        "mean of Q(s, a)": ["losses/q_values"],
    },
    "λ and ε": {"distillation coefficient λ": [DISTILL_COEFF], "ε": [EPSILON]},
    "speed": {"environment steps per second": ["charts/SPS"]},
}
DQN_CHARTS = {
    "returns": {"games": [ONLINE_RETURN, EPISODIC_RETURN]},
    "losses": {"TD loss": ["losses/td_loss"], "mean of Q(s, a)": ["losses/q_values"]},
    "ε": {"ε": [EPSILON]},
    "speed": {"environment steps per second": ["charts/SPS"]},
}

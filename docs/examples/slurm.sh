#!/bin/bash
# Three games with three seeds each as a Slurm job array: sbatch docs/examples/slurm.sh
# A job that reaches its time limit saves a checkpoint and is queued again, until its run has finished.
#SBATCH --job-name=qdagger
#SBATCH --array=0-8
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=24G
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%a.log

games=(PongNoFrameskip-v4 BreakoutNoFrameskip-v4 BeamRiderNoFrameskip-v4)
game=${games[SLURM_ARRAY_TASK_ID % ${#games[@]}]}
seed=$((SLURM_ARRAY_TASK_ID / ${#games[@]} + 1))

srun python cleanrl/qdagger_dqn_atari_impalacnn.py --env-id "$game" --seed "$seed" --resume auto
status=$?
if [ "$status" -eq 138 ]; then # 128 + SIGUSR1: stopped before the time limit, with a checkpoint
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$status"

"""Many runs of training scripts, on games and seeds: `python -m cleanrl.utils.benchmark`.

`plan` turns commands into runs, `records` keeps what became of them and `logs` what they printed; `processes`
runs them on this machine, `ray_cluster` on a Ray cluster with `copies` of their folders; `view` shows them.
"""

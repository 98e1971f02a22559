"""Workers as tasks of a Slurm job array (extra `slurm`)."""

"""Functions that the scripts use: a room a job, listed in README.md."""

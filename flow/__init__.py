"""What the scripts share: the command line, the pipeline, rewards, the judge, pictures, the run."""

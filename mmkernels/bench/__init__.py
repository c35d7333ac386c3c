"""Races of the ops against what else runs on the machine: `mmkernels bench` and the files in benchmarks/."""

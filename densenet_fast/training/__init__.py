"""The training command: real data sets, the paper's recipe, exact resume, several processes, comparison with stock."""

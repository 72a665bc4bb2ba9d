"""Background work: training and evaluation jobs, in one queue."""

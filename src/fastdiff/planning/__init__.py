"""Memory of a run, predicted without its weights and without a GPU."""

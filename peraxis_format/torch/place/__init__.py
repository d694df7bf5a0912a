"""Where the tensors of a checkpoint lie in a live model, and whether the model holds the base."""

"""Find the tensors of a checkpoint in a live model, and check that the model is the base."""

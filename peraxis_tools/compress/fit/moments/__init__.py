"""The sums (moments) of the inputs of each module, collected in as few forward passes as possible."""

"""A checkpoint pair as a model that is run one decoder block at a time."""

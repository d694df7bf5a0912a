"""A checkpoint pair as two models that run one decoder block at a time."""

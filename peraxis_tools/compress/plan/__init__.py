"""The plan: the encoding of each tensor and its bytes."""

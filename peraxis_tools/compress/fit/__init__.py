"""From sums over calibration tokens to scales and signs, module by module."""

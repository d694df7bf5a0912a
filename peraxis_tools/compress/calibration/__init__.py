"""From calibration text to token ids."""

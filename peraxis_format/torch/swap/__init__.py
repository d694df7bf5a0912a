"""One variant of a live model at a time: apply_, VariantSwitch, and their transfers."""

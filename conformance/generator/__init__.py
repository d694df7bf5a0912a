"""The corpus, made with the standard library and integers alone: never with the reference writer."""

"""The generator of the corpus, with the standard library and integers alone, without the reference writer."""

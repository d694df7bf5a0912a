"""The verbs of `peraxis-tools`: each module parses the options of one verb and prints its result with `command`."""

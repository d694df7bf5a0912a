"""The verbs of `peraxis-tools`: options in, a result out; one module a verb, each with its `command`."""

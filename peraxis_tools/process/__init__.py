"""The process of a command: signals, streams, threads, memory, and the optional packages."""

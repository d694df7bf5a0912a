"""A compression run: the order of its steps, its processes and its work folder."""

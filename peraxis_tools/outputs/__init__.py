"""Outputs of verbs: files, folders and URLs, which appear whole or not at all and never replace an input."""

"""Texts from users: documents, chat templates, and samples of tokens."""

"""Comparing variants in turns: the session, what it gave, its words and its page."""

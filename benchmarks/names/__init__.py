"""The study of the names application."""

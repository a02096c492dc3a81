"""Races programs that train and use the names classifier."""

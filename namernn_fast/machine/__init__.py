"""Finds out what can run on this machine and with its torch, and gives advice on speed."""

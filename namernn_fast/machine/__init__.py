"""Finds out what this machine and this version of torch can run, and gives advice on speed."""

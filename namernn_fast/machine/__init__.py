"""What this machine and its installation of torch can run, and advice on it."""

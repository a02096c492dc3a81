"""What is written and drawn from results."""

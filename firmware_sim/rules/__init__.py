"""What must hold whatever goes wrong, and the search for a seed in which it does not."""

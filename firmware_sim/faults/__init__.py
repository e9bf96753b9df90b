"""What goes wrong in a simulated world, drawn from the seed."""

"""A fleet of real processes on this machine: hub, broker, agents, and what goes wrong with them."""

"""What a device is made of, and how each part behaves over time: in closed form between events, never by ticks."""

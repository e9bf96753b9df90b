"""Common ground: what a device and a hub must agree on.

Nothing outside `fedge.io` opens a socket, reads a file or asks a clock.
"""

__version__ = "0.1.0"

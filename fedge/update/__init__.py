"""The update codec: a LoRA delta <-> words of the ring that sums of devices are made in.

delta -> clip -> shared signs -> strided Hadamard -> public step -> stochastic rounding -> words mod 2^b, and back
from the *sum* of a bloc's words. Everything before the rounding is one linear map on all devices, so the decoded sum
is the sum of the clipped deltas and a known little noise (`codec.predicted_error`).
"""

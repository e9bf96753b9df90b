"""Generation on the device, over the same weight file that training reads, with the adapter as plain inputs.

`decoding` runs the bundle's inference graph and keeps its key/value cache; `pages` asks the kernel for large pages
under the weights; `sampling` chooses a token from logits; `text` turns tokens into text that never splits a character
and holds back what may become a stop string; `generate` puts them together. numpy and ONNX Runtime, and `tokenizers`
for text.
"""

from edge_agent.generator.adapter import adapter_feeds
from edge_agent.generator.decoding import Decoding
from edge_agent.generator.generate import Ending, Generator, Request, Stream
from edge_agent.generator.sampling import Sampling

__all__ = ["Decoding", "Ending", "Generator", "Request", "Sampling", "Stream", "adapter_feeds"]

"""PEFT adapter folders as the hub reads and writes them; the work is `fedge.io.peft_folder`'s."""

from fedge.io.peft_folder import PeftAdapter, read_peft, write_peft

__all__ = ["PeftAdapter", "read_peft", "write_peft"]

"""Adapters in the formats of other tools: LoRA files written and read, community files read."""

"""Pictures: the one pipeline that all visitors share, what they ask of it, and what was drawn."""

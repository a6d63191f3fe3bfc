"""The server: starting it, who may come in, what it gives out, and its named endpoints."""

"""The adapters that the page knows, by id: reading, adding, deleting them."""

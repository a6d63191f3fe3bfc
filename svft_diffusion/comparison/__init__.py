"""Training the same subjects with many methods on equal terms, and what comes of each."""

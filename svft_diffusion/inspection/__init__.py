"""What an adapter file says of itself, whether it is sound, and how its facts are shown."""

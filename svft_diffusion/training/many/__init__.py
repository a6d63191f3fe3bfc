"""Many subjects: one adapter for each, from one loaded base model."""

"""The tabs of the page: each builds its part and says which event calls what."""

"""Training runs that the page starts: processes of their own, followed through their folders."""

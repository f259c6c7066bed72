"""Adapters and merged models behind HTTP (Ray Serve). Arrives with the serving release."""

"""Caches between machines: push, pull, a catalogue of what is at a place, signatures."""

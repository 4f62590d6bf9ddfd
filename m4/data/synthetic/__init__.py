"""Animated videos in the layout of Penn Action."""

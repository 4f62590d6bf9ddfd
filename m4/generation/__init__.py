"""Predicting whole modalities."""
